"""Turn pip's settings, as `pip config list` prints them to standard input, into arguments of `uv pip install`.

Fails and names the settings for which uv has no equal.
"""

import ast
import sys

ARGUMENTS = {
    "index-url": "--default-index",
    "extra-index-url": "--index",
    "find-links": "--find-links",
    "constraint": "--constraint",
    "cert": "--cert",
    "trusted-host": "--allow-insecure-host",
}
NEEDLESS = {
    "cache-dir", "default-timeout", "disable-pip-version-check", "no-cache-dir", "no-color", "no-input", "progress-bar",
    "quiet", "require-virtualenv", "retries", "root-user-action", "timeout",
}  # fmt: skip
"""What decides neither which packages come nor from where."""
SECTIONS = ("global", "install", ":env:")
"""A later one goes before an earlier one; those of pip's other commands do not count."""


def uv_arguments(listed: str) -> list[str]:
    """The arguments that do what the settings in `listed` do, such as `install.find-links='/opt/wheels'`.

    Raises ValueError where uv cannot do the same.
    """
    settings: dict[str, str] = {}
    for section in SECTIONS:
        for line in listed.splitlines():
            name, _, value = line.partition("=")
            if name.startswith(f"{section}."):
                settings[name.removeprefix(f"{section}.")] = str(ast.literal_eval(value))
    if unknown := sorted(settings.keys() - ARGUMENTS.keys() - NEEDLESS):
        raise ValueError(f"pip's settings that uv does not know: {', '.join(unknown)}")
    given = [
        word for name, flag in ARGUMENTS.items() for value in settings.get(name, "").split() for word in (flag, value)
    ]
    return [*given, "--index-strategy", "unsafe-best-match"]  # the newest release of all indices, as with pip


if __name__ == "__main__":
    try:
        print(*uv_arguments(sys.stdin.read()))
    except ValueError as error:
        sys.exit(str(error))
