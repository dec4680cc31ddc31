"""Makes a plan into one HTML page that needs neither network nor scripts, in light and in dark, at any width.

Its Content-Security-Policy allows its own style sheet alone, by its digest; bars are SVG with attributes for sizes.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator
from html import escape
from pathlib import Path

from zeroinf import __version__
from zeroinf.bench.plot_style import DARK, KINDS, LIGHT, Theme, by_kind, kind_of
from zeroinf.cli.plan_plot import PLACES
from zeroinf.cli.plan_titles import subtitle_of, title_of
from zeroinf.errors import OutputError
from zeroinf.planner.memory import total
from zeroinf.planner.summary import SOME_REQUESTS, limited_by, plan_lines
from zeroinf.planner.timing import Timing
from zeroinf.simulation.make_plan import PlanInput, PlanResult
from zeroinf.sizes import clock, gib


def write_page(model: str, plan_input: PlanInput, found: PlanResult, path: Path) -> None:
    """Write the page to `path`. Raises OutputError where it cannot be written."""
    try:
        path.write_text(plan_page(model, plan_input, found), encoding="utf-8")
    except OSError as error:
        raise OutputError(f"--html {path}: {error.strerror}", hint="choose another name") from error


def plan_page(model: str, plan_input: PlanInput, found: PlanResult) -> str:
    """The page: what to expect, where memory goes, what changes would give, and what was turned down."""
    style = _style()
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    title, subtitle = title_of(model, plan_input), subtitle_of(plan_input, found.plan)
    body = "\n".join(_body(title, subtitle, plan_input, found))
    return (
        "<!doctype html>\n"
        '<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f"<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'sha256-{digest}'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>{style}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _body(title: str, subtitle: str, plan_input: PlanInput, found: PlanResult) -> Iterator[str]:
    plan = found.plan
    yield f"<header><p class=brand>zeroinf plan</p><h1>{escape(title)}</h1><p>{escape(subtitle)}</p></header>"
    yield from _figures(found)
    yield "<section><h2>How it runs</h2>"
    yield from (f"<p>{escape(line[0].upper() + line[1:])}</p>" for line in list(plan_lines(plan))[:2] if line)
    yield "</section>"
    yield from _memory(found)
    yield from _changes(plan_input, found)
    yield from _others(found)
    known = (
        "Estimated: this machine was not measured. Run <code>zeroinf doctor --measure</code> on it."
        if found.speeds.projected
        else "With rates that were measured on this machine."
    )
    yield f"<footer><p>{known}</p><p>zeroinf {escape(__version__)}</p></footer>"


def _figures(found: PlanResult) -> Iterator[str]:
    """The figures of most weight, side by side."""
    plan, timing = found.plan, found.plan.timing
    figures = [("batch", f"{plan.batch_size:,}", "sequences at once")]
    if timing is not None:
        count = plan.requests or SOME_REQUESTS
        first = timing.first_token_s(plan.prompt_tokens, plan.prefill_tokens)
        figures = [
            ("tokens a second", _rate(timing), limited_by(timing, plan.device)),
            (f"for {count:,} requests", _spelt(timing.job_s(count, plan.new_tokens)), "loading included"),
            ("to the first token", _spelt(first), f"of it {_spelt(timing.load_s)} loading"),
            *figures,
        ]
    yield "<dl class=figures>"
    for name, value, more in figures:
        yield f"<div><dd>{escape(value)}</dd><dt>{escape(name)}</dt><dd class=more>{escape(more)}</dd></div>"
    yield "</dl>"


def _memory(found: PlanResult) -> Iterator[str]:
    terms = found.plan.terms
    yield "<section><h2>Memory</h2>"
    present = {kind_of(term.name) for term in terms}
    keys = (kind for kind in KINDS if kind in present)
    swatches = "".join(
        f'<li><svg viewBox="0 0 10 10" aria-hidden=true><rect class=k{KINDS.index(kind)} width=10 height=10 rx=2 />'
        f"</svg>{kind}</li>"
        for kind in keys
    )
    yield f"<ul class=keys>{swatches}</ul>"
    for place, name in PLACES.items():
        if not (used := total(terms, place)):
            continue
        available, start = found.decision.budgets[place], 0.0
        parts = []
        for kind, size in by_kind(terms, place).items():
            share = 100 * size / available
            width = max(share - 0.15, 0.1)  # the rest separates it from the next one
            parts.append(
                f'<rect class=k{KINDS.index(kind)} x="{start:.2f}%" width="{width:.2f}%" height="100%">'
                f"<title>{kind}: {gib(size)}</title></rect>"
            )
            start += share
        yield (
            f"<h3>{name[0].upper() + name[1:]} <span>{gib(used)} of {gib(available)}, "
            f"{100 * used / available:.0f} %</span></h3>"
            f'<svg class=bar role=img aria-label="{name}: {gib(used)} of {gib(available)}">'
            f'<rect class=free width="100%" height="100%" />{"".join(parts)}</svg>'
        )
        rows = sorted((term for term in terms if term.place == place), key=lambda term: -term.nbytes)
        yield f"<details><summary>{len(rows)} term{'s' * (len(rows) > 1)}</summary><table class=terms>"
        for term in rows:
            yield (
                f"<tr><td><svg viewBox='0 0 10 10' aria-hidden=true><rect class=k{KINDS.index(kind_of(term.name))} "
                f"width=10 height=10 rx=2 /></svg>{escape(term.name)}</td><td class=n>{gib(term.nbytes)}</td>"
                f"<td class=faint>{term.origin}</td></tr>"
            )
        yield "</table></details>"
    yield "</section>"


def _changes(plan_input: PlanInput, found: PlanResult) -> Iterator[str]:
    """This plan, and those of changes, with bars as long as they are fast."""
    if not found.advice or found.plan.timing is None:
        return
    requests, new = plan_input.constraints.requests or SOME_REQUESTS, plan_input.lengths.new_tokens
    rows = [("This plan", False, found.plan.timing, "exact" if found.plan.wire == "model" else "lossy")]
    rows += [(one.flags, True, one.candidate.timing, one.change.quality) for one in found.advice]
    most = max(timing.tokens_per_second for _, _, timing, _ in rows)
    yield "<section><h2>What changes would give</h2><table class=changes><thead><tr><th>change</th>"
    yield f"<th class=n>tokens/s</th><th></th><th class=n>{requests:,} requests</th><th>completions</th></tr></thead>"
    yield "<tbody>"
    for name, is_flag, timing, quality in rows:
        said = f"<code>{escape(name)}</code>" if is_flag else f"<b>{escape(name)}</b>"
        width = 100 * timing.tokens_per_second / most
        yield (
            f"<tr><td>{said}</td><td class=n>{_rate(timing)}</td>"
            f"<td class=speed><svg aria-hidden=true><rect class={'ours' if not is_flag else 'other'} rx=2 "
            f'width="{width:.1f}%" height="100%" /></svg></td>'
            f"<td class=n>{_spelt(timing.job_s(requests, new))}</td><td class=faint>{quality}</td></tr>"
        )
    yield "</tbody></table>"
    yield (
        "<p class=faint>Changes are planned with few candidates: a run expects as much or more. "
        "<code>zeroinf eval</code>, with and without one, measures what it costs in quality.</p></section>"
    )


def _others(found: PlanResult) -> Iterator[str]:
    decision = found.decision
    if not (decision.alternatives or decision.rejected):
        return
    yield "<section><h2>Other ways to run</h2><ul class=others>"
    for one in decision.alternatives:
        yield (
            f"<li><code>--offload {one.choice.offload}</code> {_rate(one.timing)} tokens/s at batch "
            f"{one.choice.batch_size:,}; {limited_by(one.timing, found.plan.device)}</li>"
        )
    for rejected in decision.rejected:
        yield f"<li><code>--offload {rejected.offload}</code> does not fit: {escape(rejected.reason)}</li>"
    yield "</ul></section>"


def _rate(timing: Timing) -> str:
    rate = timing.tokens_per_second
    return f"{rate:,.{0 if rate >= 100 else 1 if rate >= 1 else 3}f}"


def _spelt(seconds: float) -> str:
    """A duration in its two largest units."""
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    hours, minutes, rest = ([0, *map(int, clock(seconds).split(":"))])[-3:]
    return f"{hours:,} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def _variables(theme: Theme) -> str:
    kinds = "".join(f"--k{index}:{colour};" for index, colour in enumerate(theme.kinds))
    return (
        f"--ground:{theme.ground};--text:{theme.text};--faint:{theme.faint};--empty:{theme.empty};"
        f"--ours:{theme.lines[0]};{kinds}"
    )


def _style() -> str:
    kinds = "".join(f".k{index}{{fill:var(--k{index})}}" for index in range(len(KINDS)))
    return (
        f":root{{{_variables(LIGHT)}}}@media(prefers-color-scheme:dark){{:root{{{_variables(DARK)}}}}}{kinds}{_RULES}"
    )


_RULES = """
*{box-sizing:border-box}
body{margin:0;background:var(--ground);color:var(--text);font:16px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:58rem;margin:0 auto;padding:2.5rem 1.5rem 3rem}
h1{font-size:1.9rem;line-height:1.2;margin:.1rem 0 .4rem;letter-spacing:-.015em;overflow-wrap:anywhere}
h2{font-size:1.15rem;margin:2.6rem 0 .7rem}
h3{font-size:1rem;margin:1.3rem 0 .4rem;display:flex;justify-content:space-between;gap:1rem;flex-wrap:wrap}
h3 span{font-weight:400;color:var(--faint);font-variant-numeric:tabular-nums}
p{margin:.2rem 0}
header p,.faint,footer,.more{color:var(--faint)}
.brand{font-weight:600;color:var(--ours)}
code{font:.92em ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;overflow-wrap:anywhere}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(11rem,1fr));gap:1rem;margin:1.8rem 0 0}
.figures div{border-top:3px solid var(--ours);padding-top:.6rem;display:flex;flex-direction:column}
.figures dd{margin:0;font-size:1.65rem;font-weight:650;line-height:1.2;font-variant-numeric:tabular-nums}
.figures dt{font-weight:600}
.figures .more{font-size:.88rem;font-weight:400;line-height:1.4}
.keys{list-style:none;display:flex;flex-wrap:wrap;gap:.3rem 1.2rem;padding:0;margin:0;font-size:.92rem}
.keys svg,.terms svg{width:.75em;height:.75em;margin-right:.5em}
.bar{display:block;width:100%;height:1.9rem;border-radius:5px;overflow:hidden}
.free{fill:var(--empty)}
details{margin:.35rem 0 0;font-size:.92rem}
summary{cursor:pointer;color:var(--faint)}
table{border-collapse:collapse;width:100%;font-size:.95rem}
th{text-align:left;font-weight:600;color:var(--faint);font-size:.85rem}
th,td{padding:.45rem .9rem .45rem 0;border-bottom:1px solid var(--empty);vertical-align:middle}
td:last-child,th:last-child{padding-right:0}
.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
.speed{width:20%}
.changes td:last-child{white-space:nowrap}
.changes+p{margin-top:.7rem}
.speed svg{display:block;width:100%;height:.7rem}
.ours{fill:var(--ours)}
.other{fill:var(--faint)}
.terms td{padding-top:.25rem;padding-bottom:.25rem}
.others{padding-left:1.1rem;margin:0}
.others li{margin:.35rem 0}
footer{margin-top:2.8rem;padding-top:.9rem;border-top:1px solid var(--empty);font-size:.9rem}
footer{display:flex;justify-content:space-between;gap:1rem;flex-wrap:wrap}
@media(max-width:40rem){
main{padding:1.4rem 1rem 2rem}
h1{font-size:1.5rem}
.figures{grid-template-columns:1fr 1fr}
.figures dd{font-size:1.35rem}
.changes thead{display:none}
.changes tr{display:grid;grid-template-columns:1fr auto;gap:.1rem 1rem;padding:.7rem 0}
.changes tr{border-bottom:1px solid var(--empty)}
.changes td{border:0;padding:0}
.changes td:nth-child(2)::after{content:" tokens/s"}
.changes .speed{grid-column:1/-1;width:auto;padding:.3rem 0}
.changes td:nth-child(4){grid-column:2;grid-row:3}
.changes td:nth-child(5){grid-column:1;grid-row:3}
}
"""
