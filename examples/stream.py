"""Asks several questions at once, and prints each answer as it comes.

usage: python stream.py [MODEL]
"""

import asyncio
import sys

import zeroinf

QUESTIONS = ("Why is the sky blue?", "What is a prime number?", "Who wrote Hamlet?")


async def ask(pipe: zeroinf.Pipeline, question: str) -> None:
    chat = [{"role": "user", "content": question}]
    text = ""
    async for event in pipe.submit(chat, max_new_tokens=24):
        text += event.text
    print(f"{question}\n    {text.strip()}")


async def main(model: str) -> None:
    with zeroinf.pipeline(model, offload="cpu", max_prompt_tokens=64, max_new_tokens=24) as pipe:
        await asyncio.gather(*(ask(pipe, question) for question in QUESTIONS))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else "demo"))
