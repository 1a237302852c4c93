"""Samples as a page: what is learned, what is context and what was cut, in three colours."""

import html
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mixtral_recipes.data.modules.pipeline import Outcome
from mixtral_recipes.system.files import write_text

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#1c2430}
h2{font-size:1rem;margin:2rem 0 .3rem}pre{white-space:pre-wrap;overflow-wrap:anywhere;background:#f6f7f9;padding:.8rem}
pre,.key{font-family:ui-monospace,monospace}.learned{background:#cdeccd}.context{color:#5d6b7e}
.cut{background:#f7d4cf;text-decoration:line-through}
"""


def write_page(file: Path, title: str, outcomes: Iterable[Outcome], tokenizer: Any) -> None:
    """Write the page.

    Args:
        file: Where to; ``.html``.
        title: Its title.
        outcomes: What became of the records, as a run makes it.
        tokenizer: What they were tokenized with.
    """
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title><style>{_STYLE}</style>",
        f"<h1>{html.escape(title)}</h1><p class=key><span class=learned>learned</span> "
        "<span class=context>context</span> <span class=cut>cut off, or left out</span></p>",
    ]
    for outcome in outcomes:
        runs = list(_runs(outcome))
        counts = {kind: sum(len(tokens) for k, tokens in runs if k == kind) for kind in ("learned", "context", "cut")}
        told = ", ".join(f"{count:,} {kind}" for kind, count in counts.items() if count)
        why = f" ({outcome.fitted.why})" if outcome.fitted.why else ""
        where, whole = html.escape(str(outcome.example.where)), len(outcome.encoded.tokens)
        parts.append(f"<h2>{where}: {whole:,} tokens: {told}{why}</h2>")
        spans = (f"<span class={kind}>{html.escape(tokenizer.decode(tokens))}</span>" for kind, tokens in runs)
        parts.append(f"<pre>{''.join(spans)}</pre>")
    write_text(file, "\n".join(parts) + "\n")


def _runs(outcome: Outcome) -> Iterator[tuple[str, list[int]]]:
    """The record's tokens in runs of one kind."""
    tokens, learned, *_ = outcome.encoded
    if outcome.fitted.sample is None:
        yield "cut", tokens
        return
    first, removed = outcome.fitted.removed
    end = len(outcome.fitted.sample.tokens) + removed
    kinds = [
        "cut" if first <= n < first + removed or n >= end else "learned" if is_learned and n else "context"
        for n, is_learned in enumerate(learned)
    ]
    for kind, run in itertools.groupby(zip(kinds, tokens, strict=True), key=lambda pair: pair[0]):
        yield kind, [token for _, token in run]
