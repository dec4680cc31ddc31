"""The model `zeroinf` of lm-evaluation-harness, for tasks with large models.

The harness asks for all requests of a kind at once: log-likelihoods of all tasks, then rolling ones, then generations.
The model is planned and loaded when it is first needed; later requests that fit use the same one, otherwise it is
planned and loaded again. Needs the package lm-eval (the extra `eval`); `import zeroinf` does not import it.
"""

from __future__ import annotations

import atexit
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from zeroinf.distributed.world import world_from_environment
from zeroinf.errors import DoesNotFitError, InputError, ModelError, UsageError
from zeroinf.generation.micro_batch import breaks_at
from zeroinf.lm_eval.options import batch_size_of, options_of, refuse_idle, sampling_of
from zeroinf.lm_eval.work import Prompt, answer, completed, grouped, scored_of
from zeroinf.model.tokenizer import load_tokenizer
from zeroinf.options.contradictions import engine_of
from zeroinf.options.model import anatomy_of, source_of
from zeroinf.options.planning import packed_on
from zeroinf.planner.descriptor import packs_scores
from zeroinf.planner.memory import scores_bytes
from zeroinf.planner.plan import Plan
from zeroinf.planner.workload import Lengths
from zeroinf.runs.progress import ProgressObserver
from zeroinf.runs.session import Session, open_session
from zeroinf.service.device import pick_device

_log = logging.getLogger("lm_eval.zeroinf")

_DEFAULT_LENGTH = 2048
"""The context of models that name none, as the harness has it."""
_SCORES_BYTES = 256 << 20
"""So much memory for the scores of a forward is worth it: more sequences share one."""


@register_model("zeroinf")
class ZeroinfLM(TemplateLM):  # type: ignore[misc]
    """Decoder-only models, planned and streamed by zeroinf.

    `simple_evaluate(model=ZeroinfLM("demo", offload="cpu"), tasks=...)` from Python, `zeroinf lm-eval --model_args
    pretrained=demo,offload=cpu --tasks ...` from a shell. With `num_gpus` other ranks work for this process.
    """

    backend = "causal"

    def __init__(
        self,
        pretrained: str,
        *,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        chat_template_args: Mapping[str, Any] | None = None,
        enable_thinking: bool | None = None,
        think_end_token: str | None = None,
        **options: Any,
    ) -> None:
        """`pretrained` is what `zeroinf.pipeline` calls `model`; `options` are its other keywords.

        `batch_size`: the most sequences at a time; 1, which is the harness's own default, and "auto" let the planner
        choose. `max_length`: tokens of context, longer contexts lose their beginnings; None is the model's. The others
        mean what they mean for the harness's `hf` models. Raises UsageError for what is unknown or without effect,
        and for a model with an encoder. Nothing is loaded yet.
        """
        super().__init__()
        refuse_idle(max_batch_size, device, think_end_token)
        self._num_gpus, progress, self._options = options_of(pretrained, batch_size_of(batch_size), options)
        self._observer = ProgressObserver(progress)
        self._session: Session | None = None
        world = world_from_environment()
        if world.launched:
            raise UsageError("a launcher has started ranks", hint="zeroinf starts them itself: num_gpus in model_args")
        asked = self._options
        device_type = pick_device(world).type
        source = source_of(asked, device_type)
        self._anatomy = anatomy_of(asked, source, device_type)
        anatomy = packed_on(self._anatomy, device_type)
        self._shares_contexts = packs_scores(anatomy, engine_of(asked)[0]) and breaks_at(source.config) is None
        if self._anatomy.encoder is not None:
            raise UsageError(
                f"{self._anatomy.architecture} has an encoder: `zeroinf` evaluates decoder-only models",
                hint="the harness's own hf backend runs it: --model hf",
            )
        self.tokenizer = load_tokenizer(source)
        self._max_length = max_length
        self.max_gen_toks = max_gen_toks
        self._add_bos_token, self._prefix_token_id = add_bos_token, prefix_token_id
        thinking = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
        self._template_args = {**(chat_template_args or {}), **thinking}
        self._think_end_token = think_end_token
        self._encode = lru_cache(maxsize=64)(self._encode_anew)

    # What the harness reads of a model

    @property
    def plan(self) -> Plan | None:
        """The plan that the model runs by; None until something has been asked."""
        return None if self._session is None else self._session.plan

    @property
    def max_length(self) -> int:
        """The most tokens of context."""
        if self._max_length is not None:
            return self._max_length
        if self._anatomy.context_limit is not None:
            return self._anatomy.context_limit
        named = getattr(self.tokenizer, "model_max_length", None)
        return int(named) if named is not None and named < 1 << 40 else _DEFAULT_LENGTH

    @property
    def batch_size(self) -> int | str:
        """Sequences at a time."""
        return "auto" if self._session is None else self._session.plan.batch_size

    @property
    def eot_token_id(self) -> int:
        """The end-of-sequence token."""
        return int(self._tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The token before a text that has nothing before it."""
        if self._prefix_token_id is not None:
            return self._prefix_token_id
        bos = self._tokenizer.bos_token_id
        return int(self.eot_token_id if bos is None else bos)

    @property
    def tokenizer_name(self) -> str:
        """The tokenizer's name for the harness's caches of prompts."""
        return str(self._tokenizer.name_or_path).replace("/", "__")

    @property
    def _tokenizer(self) -> Any:
        if self.tokenizer is None:
            raise ModelError("random weights without a tokenizer cannot read tasks", hint="name a model that has one")
        return self.tokenizer

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids; a text that begins with the beginning-of-sequence token gets no second one."""
        return list(self._encode(string, add_special_tokens))

    def _encode_anew(self, string: str, add_special_tokens: bool | None) -> Sequence[int]:
        if add_special_tokens is None:
            begins = string.startswith(self._tokenizer.decode(self.prefix_token_id))
            add_special_tokens = False if begins else self._add_bos_token
        special = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return tuple(self._tokenizer.encode(string, **special))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a chat. Where the template takes no system message, it is rendered without, with a warning."""
        import jinja2

        def render(messages: list[dict[str, str]]) -> str:
            rendered = self._tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
                **self._template_args,
            )
            return str(rendered)

        try:
            return render(chat_history)
        except jinja2.exceptions.TemplateError:
            _log.warning("the chat template refuses these messages: rendered without the system message")
            return render([message for message in chat_history if message["role"] != "system"])

    # What the harness asks

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        """For each request (texts, tokens of the context, tokens of the continuation), the log-likelihood of the
        continuation, and whether it is what greedy decoding gives."""
        if not requests:
            return []
        asked = grouped(requests, self.max_length, shares_contexts=self._shares_contexts)
        session = self._opened_for_scores([(each.length, each.scores) for each in asked])
        found: list[tuple[float, bool] | None] = [None] * len(requests)
        tokens = sum(each.length for each in asked)
        with tqdm(total=tokens, unit=" tokens", unit_scale=True, desc="log-likelihoods", disable=disable_tqdm) as bar:
            for each, scores in scored_of(session, asked):
                bar.update(each.length)
                for index, number in each.members:
                    told = found[index] = answer(scores, number)
                    if (texts := requests[index][0]) is not None:
                        self.cache_hook.add_partial("loglikelihood", texts, told)
        return [each for each in found if each is not None]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each text, in windows of `max_length` tokens."""
        windows: list[tuple[None, list[int], list[int]]] = []
        counts = []
        for (text,) in (request.args for request in requests):
            rolling = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            pairs = list(map(make_disjoint_window, rolling))
            counts.append(len(pairs))
            windows += [(None, context, continuation) for context, continuation in pairs]
        logs = iter(log for log, _ in self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm))
        found = []
        for request, count in zip(requests, counts, strict=True):
            found.append(sum(next(logs) for _ in range(count)))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, found[-1])
        return found

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The text that follows each context, up to the first of its stops."""
        if not requests:
            return []
        prompts = [self._prompt(index, *request.args) for index, request in enumerate(requests)]
        session = self._opened_for(prompts)
        found: list[str | None] = [None] * len(requests)
        most = sum(prompt.sampling.max_new_tokens for prompt in prompts)
        with tqdm(total=most, unit=" tokens", unit_scale=True, desc="generations", disable=disable_tqdm) as bar:
            for prompt, completion in completed(session, prompts):
                text = found[prompt.index] = self._shown(completion, prompt.sampling.stop)
                self.cache_hook.add_partial("generate_until", requests[prompt.index].args, text)
                bar.update(prompt.sampling.max_new_tokens)
        return [text for text in found if text is not None]

    def _prompt(self, index: int, context: str, settings: Mapping[str, Any]) -> Prompt:
        sampling = sampling_of(settings, self.max_gen_toks, self._tokenizer.decode(self.eot_token_id))
        room = self.max_length - sampling.max_new_tokens
        if room < 1:
            raise UsageError(
                f"{sampling.max_new_tokens} tokens to generate, but the model's context holds {self.max_length}",
                hint="lower max_gen_toks, in the task or by --gen_kwargs",
            )
        tokens = self.tok_encode(context)[-room:]
        if not tokens:
            raise InputError(f"context {index} of the tasks holds no tokens")
        return Prompt(index, tokens, sampling)

    def _shown(self, text: str, stops: Sequence[str]) -> str:
        if self._think_end_token is not None:
            text = text.split(self._think_end_token)[-1].lstrip()
        for stop in stops:
            text = text.split(stop)[0]
        return text

    # The model itself

    def _opened_for_scores(self, asked: Sequence[tuple[int, int]]) -> Session:
        """A session for sequences of so many tokens, of which so many are scored."""
        longest, scored = max(length for length, _ in asked), max(scored for _, scored in asked)
        together = _SCORES_BYTES // max(1, scores_bytes(self._anatomy, 1))
        lengths = Lengths(
            prompt_tokens=longest, new_tokens=1, padded=False, whole=True,
            scored_tokens=max(scored, min(together, sum(scored for _, scored in asked))),
        )  # fmt: skip
        try:
            return self._opened(
                lengths, len(asked), lambda plan: plan.prompt_tokens >= longest and plan.scored_tokens >= scored
            )
        except DoesNotFitError as error:
            shorter = "a shorter max_length (in --model_args) takes less, if long texts are to be scored"
            raise DoesNotFitError(error.message, hint=f"{error.hint}; {shorter}" if error.hint else shorter) from error

    def _opened_for(self, prompts: Sequence[Prompt]) -> Session:
        rows = [(len(prompt.tokens), prompt.sampling.max_new_tokens) for prompt in prompts]
        lengths = Lengths.of(self._anatomy, rows)
        longest, most = lengths.prompt_tokens, lengths.new_tokens
        return self._opened(lengths, len(rows), lambda plan: plan.prompt_tokens >= longest and plan.new_tokens >= most)

    def _opened(self, lengths: Lengths, requests: int, fits: Callable[[Plan], bool]) -> Session:
        if self._session is not None:
            if fits(self._session.plan) and not self._session.service.has_failed:
                return self._session
            self._session.close()
            self._session = None
        else:
            atexit.register(self.close)
        self._session = open_session(self._options, lengths, requests, self._observer, self._num_gpus)
        return self._session

    def close(self) -> None:
        """Free the model. At the end of the process it happens by itself."""
        atexit.unregister(self.close)
        session, self._session = self._session, None
        if session is not None:
            session.close()

    def __enter__(self) -> ZeroinfLM:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
