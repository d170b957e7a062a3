"""The page of the maps: an answer first, then the figures, how to read them, and what is lost."""

from collections.abc import Iterable, Iterator
from types import ModuleType

from cpunorm import _advice
from cpunorm._advice import Advice

from ..results import pass_text
from ..suites import EXAMPLES
from . import accuracy, advice, backends, choices, heat, libraries, normalizations, roofline
from .style import Figure
from .table import NAMES, Measured, geometric_mean

FAMILIES: dict[str, ModuleType] = {
    "Which normalization is cheapest": normalizations,
    "Which library is fastest": libraries,
    "Which backend is fastest": backends,
    "Layouts, threads, types, groups": choices,
    "How far from memory speed": roofline,
    "Accuracy next to speed": accuracy,
}
SHAPE = EXAMPLES[0]
MOST_LOST = 60
# Medians as far apart as this have the word, however wide their quartiles.
FAR = 1.3
# As HTML: a link in Markdown to a file that is no page would become a download.
EXPLORER = '<a href="explore.html">the interactive page</a>'

READING = """\
A cell is one shape. The line between two areas is the crossover: on it the two are equal. In a map
of winners a letter names the winner, and the number below it says how many times as long the next
one takes: 1.05 is next to nothing, and ≈ means that the two overlap within their quartiles. In a
map of ratios 1 is equal, and the scale of colours is logarithmic, so that twice as fast and half as
fast are equally far from the middle.

Every time is the median over blocks of calls, each implementation in a process of its own, in its
best form, warmed up and in turns with the others; the quartiles of the blocks are the spread.
Layer and RMS norm are over the channels of every position (of every row, for rows); group norm has
gcd(C, 32) groups. A copy is our own parallel copy of the tensor, in backward passes the triad,
which reads two arrays and writes one. Times wander with whatever else shares the caches, so trust
ratios within one run, and of those the ones beyond the spread.

What is cheapest says nothing about what a network learns best with."""


def files(measured: Measured) -> dict[str, bytes]:
    """Return the page and its figures by name of file."""
    found = {title: list(family.figures(measured)) for title, family in FAMILIES.items()}
    text = "\n".join(_page(measured, found)) + "\n"
    contents = [f.files(measured) for figures in found.values() for f in figures]
    return {"index.md": text.encode()} | {n: c for some in contents for n, c in some.items()}


def _page(measured: Measured, found: dict[str, list[Figure]]) -> Iterator[str]:
    data = advice.data(measured)

    def ask(shape: tuple[int, ...], training: bool, layout: str | None = None) -> Advice:
        threads = measured.most_threads
        return _advice.answer(data, shape, layout, training, None, "float32", threads)

    yield "# Maps: which normalization, layout, backend and library for which shape\n"
    yield from _answer({layout: ask(SHAPE, False, layout) for layout in _advice.LAYOUTS}, measured)
    yield from _examples([(ask(s, False), ask(s, True)) for s in EXAMPLES])
    yield (
        f"Measured {measured.date} on {measured.machine_line()}, float32 on "
        f"{measured.threads_line} unless a figure says otherwise: "
        f"{measured.versions_line()}. `{measured.machine['command']}` measures, "
        "`python -m bench report` draws.\n"
    )
    yield f"Choose operation, pass, layout and type: {EXPLORER}.\n"
    for title, figures in found.items():
        yield f"## {title}\n"
        if not figures:
            yield "Left out: the results hold nothing to draw it from.\n"
        for figure in figures:
            yield f"### {figure.title}\n"
            yield f"![{figure.title}]({figure.name}.png)\n"
            links = f"[CSV]({figure.name}.csv), [JSON]({figure.name}.json)"
            yield f"{figure.caption} Numbers: {links}.\n"
    yield f"## How to read them\n\n{READING}\n"
    yield from _lost(measured)


def _shape(shape: Iterable[int]) -> str:
    return f"({', '.join(map(str, shape))})"


def _answer(advices: dict[str, Advice], measured: Measured) -> Iterator[str]:
    """Yield which normalization to take for the example, with a line for each."""
    by_name: dict[str, dict[str, _advice.Estimate]] = {}
    for layout, given in advices.items():
        for estimate in given.ranking:
            by_name.setdefault(estimate.normalization, {})[layout] = estimate
    everyone = [e for some in by_name.values() for e in some.values()]
    if not everyone:
        return
    best, *others = sorted(everyone, key=lambda e: e.seconds)
    equal: dict[str, float] = {}
    for e in others:
        if e.normalization != best.normalization and _equal(e, best):
            equal.setdefault(e.normalization, e.seconds)
    names = " or ".join(NAMES[name] for name in (best.normalization, *equal))
    apart = f", {100 * max(equal.values()) / best.seconds - 100:.0f} % apart" if equal else ""
    yield (
        f"**For {_shape(SHAPE)} in inference take {names}**{apart}: {_advice.time_of(best)}, "
        f"{best.times_copy:.2f} times as long as copying the tensor. That is for a network yet to "
        "be trained: one trained with batch norm cannot take another without training it again.\n"
    )
    yield "| inference, float32 | NCHW, µs | NHWC, µs | ÷ cheapest | ÷ copy | best peer ÷ cpunorm |"
    yield "|---|---|---|---|---|---|"
    for name, some in sorted(by_name.items(), key=lambda i: min(e.seconds for e in i[1].values())):
        least = min(some.values(), key=lambda e: e.seconds)
        cells = [_micro(some[layout]) if layout in some else "–" for layout in advices]
        ratios = f"{least.seconds / best.seconds:.2f} | {least.times_copy:.2f}"
        peers = _peers(measured, name)
        yield f"| {NAMES[name]} | {' | '.join(cells)} | {ratios} | {peers} |"
    yield ""
    sure = {
        "measured": "Each is the median of blocks of calls at this very shape, with the quartiles",
        "inside": "Interpolated between measured shapes, with the error that this has",
    }.get(best.sure, "Guessed from far shapes")
    yield f"{sure}. For any other shape: `python -m cpunorm advise 32,256,14,14`.\n"


def _equal(one: _advice.Estimate, other: _advice.Estimate) -> bool:
    """Whether nobody can tell which is faster: next to nothing apart, or not far for the spread."""
    less, more = sorted((one.seconds, other.seconds))
    return more < heat.CLEAR * less or (more < FAR * less and one.overlaps(other))


def _micro(estimate: _advice.Estimate) -> str:
    """Return the time with its spread."""
    median, low, high = (f"{s * 1e6:.3g}" for s in (estimate.seconds, estimate.low, estimate.high))
    return f"{median} ({low} to {high})"


def _peers(measured: Measured, operation: str) -> str:
    """Return how the best peer stands at the example, per layout."""
    found = []
    for row in measured.select(operation, "inference", where=lambda r: r.shape == SHAPE):
        if leads := libraries.lead(measured, row):
            ratio, peer = leads
            found.append(f"{ratio:.2f} ({peer.implementation}, {row.layout})")
    return ", ".join(dict.fromkeys(found)) or "–"


def _examples(pairs: list[tuple[Advice, Advice]]) -> Iterator[str]:
    """Yield a line per example shape: what is cheapest in inference and in training."""
    yield "| shape | inference: cheapest | next | training step: cheapest | next |"
    yield "|---|---|---|---|---|"
    for pair in pairs:
        cells = [cell for given in pair for cell in _ranks(given)]
        yield f"| {_shape(pair[0].shape)} | {' | '.join(cells)} |"
    yield ""
    yield "A training step is forward and backward. ≈ is as cheap, ~ interpolated, ? a guess.\n"


def _ranks(given: Advice) -> list[str]:
    """Return the two cheapest, each with its layout and time."""
    marks = {"measured": "", "inside": "~", "outside": "?"}
    some = [
        f"{'≈ ' * (i > 0 and _equal(e, given.ranking[0]))}"
        f"{NAMES[e.normalization]}{f', {e.layout}' if e.layout else ''}: "
        f"{marks[e.sure]}{_advice.time_of(e)}"
        for i, e in enumerate(given.ranking[:2])
    ]
    return [*some, *("not known", "–")[len(some) :]]


def _lost(measured: Measured) -> Iterator[str]:
    """Yield the shapes where a peer is faster."""
    yield "## Where cpunorm loses\n"
    compared = [
        found for row in measured.select(dtype=None) if (found := libraries.lead(measured, row))
    ]
    if not compared:
        yield "Not known: no other library was measured."
        return
    lost = libraries.lost(measured)
    clear = [entry for entry in lost if entry[3]]
    mean = geometric_mean(ratio for ratio, _ in compared)
    yield (
        f"Over {len(compared)} cases on {measured.threads_line}, in every type, the best "
        f"peer takes {mean:.2f} times as long in the geometric mean. A peer is faster on "
        f"{len(lost)} of them, beyond the spread on {len(clear)}."
    )
    if not lost:
        return
    shown = lost[:MOST_LOST]
    if len(lost) > len(shown):
        yield f"The {len(shown)} worst; the figures' files have all of float32."
    heads = "best peer ÷ cpunorm | operation | pass | layout | type | shape | peer | cpunorm µs"
    yield f"\n| {heads} | |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for ratio, row, peer, is_clear in shown:
        groups = f", G={row.num_groups}" if row.num_groups else ""
        pass_ = pass_text(row.operation, row.pass_)
        yield (
            f"| {ratio:.2f} | {NAMES[row.operation]} | {pass_} | {row.layout} | "
            f"{row.dtype} | {_shape(row.shape)}{groups} | {peer.implementation} {peer.version} | "
            f"{row.median * 1e6:.3g} | {'' if is_clear else 'within the spread'} |"
        )
