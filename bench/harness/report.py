"""Results as a table on the terminal, csv, markdown and a plot."""

import csv
from collections.abc import Callable
from pathlib import Path

import matplotlib

from .. import limits
from .runner import Measurement, Results
from .workload import OURS

matplotlib.use("Agg")
from matplotlib import pyplot as plt

Plot = Callable[[Path, Results, dict[str, str]], None]

COLUMNS = (
    "case",
    "threads",
    "provider",
    "best",
    "median",
    "cpu",
    "rate",
    "ours vs it",
    "cpu ratio",
    "of limit",
    "error",
)
MOST_PLOTTED = 40  # cases; a plot of more is a tapestry
COLOURS = ("#d1495b", "#30638e", "#edae49", "#00798c", "#8d6a9f", "#7f7f7f", "#5b8e7d", "#b08968")


def table(results: Results) -> list[tuple[str, ...]]:
    """One line per measurement; "ours vs it" is how many times faster ours is than the provider of the line."""
    lines: list[tuple[str, ...]] = []
    for row in results.measurements:
        ours = _ours(results, row)
        lines.append(
            (
                row.case,
                str(row.threads),
                row.provider,
                _seconds(row.timing.best),
                _seconds(row.timing.median),
                _seconds(row.timing.processor),
                f"{_amount(row.rate)}{row.unit}/s",
                f"{row.timing.best / ours.timing.best:.2f}",
                f"{row.timing.processor / ours.timing.processor:.2f}" if ours.timing.processor else "",
                "" if row.of_limit is None else f"{row.of_limit:.0%} {row.bound_by}",
                f"{row.error:.2g}",
            )
        )
    return lines


def limit_lines(results: Results) -> list[tuple[str, ...]]:
    return [
        (name, str(threads), f"{_amount(rate)}{limits.UNITS[name]}/s")
        for threads, rates in results.limits.items()
        for name, rate in rates.items()
    ]


def goal_lines(results: Results) -> list[tuple[str, ...]]:
    return [
        (
            verdict.case,
            str(verdict.threads),
            f"{verdict.wanted:g} {verdict.goal}",
            "" if verdict.reached is None else f"{verdict.reached:.2f}",
            verdict.outcome,
        )
        for verdict in results.verdicts
    ]


def print_all(family: str, results: Results, circumstances: dict[str, str]) -> None:
    print(f"\n{family} on {circumstances['cpu']} ({circumstances['device']}, ISA level {circumstances['isa']})")
    for header, lines in _sections(results):
        print()
        _print_aligned([header, *lines])


def write_all(
    folder: Path, stem: str, results: Results, circumstances: dict[str, str], plot: Plot | None = None
) -> None:
    """Write <stem>.csv, <stem>.md and <stem>.png: the family's own `plot`, or else, where anything was timed, but not
    too much of it, bars of every case."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_csv(folder / f"{stem}.csv", results, circumstances)
    _write_markdown(folder / f"{stem}.md", stem, results, circumstances)
    if plot is not None:
        plot(folder / f"{stem}.png", results, circumstances)
    elif 0 < len({row.case for row in results.measurements}) <= MOST_PLOTTED:
        _plot(folder / f"{stem}.png", stem, results, circumstances)


def _sections(results: Results) -> list[tuple[tuple[str, ...], list[tuple[str, ...]]]]:
    sections = [
        (COLUMNS, table(results)),
        (("goal of", "threads", "wanted", "reached", "outcome"), goal_lines(results)),
        (("limit", "threads", "rate"), limit_lines(results)),
    ]
    return [(header, lines) for header, lines in sections if lines]


def _print_aligned(lines: list[tuple[str, ...]]) -> None:
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    for number, line in enumerate(lines):
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
        if number == 0:
            print("  ".join("-" * width for width in widths))


def _write_csv(path: Path, results: Results, circumstances: dict[str, str]) -> None:
    rows = [_csv_row(results, row) for row in results.measurements]
    rows += [
        {"case": "limit", "threads": threads, "provider": name, "rate": f"{rate:.6g}", "unit": limits.UNITS[name]}
        for threads, rates in results.limits.items()
        for name, rate in rates.items()
    ]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*max(rows, key=len), *circumstances])
        writer.writeheader()
        writer.writerows(row | circumstances for row in rows)


def _csv_row(results: Results, row: Measurement) -> dict[str, object]:
    return {
        "case": row.case,
        "threads": row.threads,
        "provider": row.provider,
        "best_s": f"{row.timing.best:.6g}",
        "median_s": f"{row.timing.median:.6g}",
        "processor_s": f"{row.timing.processor:.6g}",
        "rate": f"{row.rate:.6g}",
        "unit": row.unit,
        "ours_vs_it": f"{row.timing.best / _ours(results, row).timing.best:.4g}",
        "of_limit": "" if row.of_limit is None else f"{row.of_limit:.4g}",
        "limit": row.bound_by or "",
        "error": f"{row.error:.4g}",
    }


def _write_markdown(path: Path, title: str, results: Results, circumstances: dict[str, str]) -> None:
    lines = [f"# {title}", "", *(f"- {name}: {value}" for name, value in circumstances.items())]
    for header, body in _sections(results):
        lines += ["", f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
        lines += [f"| {' | '.join(cells)} |" for cells in body]
    if results.measurements:
        lines += [
            "",
            "`best` and `median` are wall-clock times of a call, `cpu` is the best processor time of all its threads; "
            "`ours vs it` and `cpu ratio` are the provider's time over ours; `of limit` is the least time that the "
            "limit named allows, over the best time; `error` is the family's own figure.",
        ]
    path.write_text("\n".join(lines) + "\n")


def _plot(path: Path, title: str, results: Results, circumstances: dict[str, str]) -> None:
    """Speed of every provider by case, one panel per thread count: as a share of the limit, or else of our speed."""
    threads = list(results.limits)
    cases = list(dict.fromkeys(row.case for row in results.measurements))
    providers = list(dict.fromkeys(row.provider for row in results.measurements))
    against_limit = all(row.of_limit is not None for row in results.measurements)
    height = 1.6 + len(cases) * (0.16 * len(providers) + 0.22)
    figure, axes = plt.subplots(1, len(threads), figsize=(2.6 + 4.6 * len(threads), height), sharey=True, squeeze=False)
    for axis, count in zip(axes[0], threads, strict=True):
        for index, provider in enumerate(providers):
            rows = [row for row in results.measurements if row.provider == provider and row.threads == count]
            positions = [
                cases.index(row.case) + (index - (len(providers) - 1) / 2) * 0.8 / len(providers) for row in rows
            ]
            shares = [100 * (_share_of_ours(results, row) if row.of_limit is None else row.of_limit) for row in rows]
            bars = axis.barh(
                positions, shares, 0.8 / len(providers), label=provider, color=COLOURS[index % len(COLOURS)]
            )
            axis.bar_label(bars, [f"{share:.0f}" for share in shares], padding=2, fontsize=7)
        axis.set_title(
            f"{count} thread{'s' if count > 1 else ''}" if circumstances["device"] == "cpu" else "", fontsize=10
        )
        axis.set_xlabel("% of the hardware limit" if against_limit else "speed, % of ours")
        if against_limit:
            axis.axvline(100, color="#888888", linewidth=0.8, linestyle=":", zorder=0)
        axis.margins(x=0.1)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_yticks(range(len(cases)), cases, fontsize=8)
    axes[0][0].invert_yaxis()
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.suptitle(f"{title}: {circumstances['cpu']}, {circumstances['isa']}", fontsize=11)
    figure.legend(handles, labels, loc="lower center", ncols=min(4, len(providers)), frameon=False, fontsize=9)
    legend_rows = -(-len(providers) // 4)
    figure.tight_layout(rect=(0, 0.28 * legend_rows / height, 1, 1))
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _ours(results: Results, row: Measurement) -> Measurement:
    return next(
        other
        for other in results.measurements
        if (other.case, other.threads, other.provider) == (row.case, row.threads, OURS)
    )


def _share_of_ours(results: Results, row: Measurement) -> float:
    return _ours(results, row).timing.best / row.timing.best


def _seconds(value: float) -> str:
    for factor, unit in ((1, "s"), (1e3, "ms"), (1e6, "us")):
        if value * factor >= 1:
            return f"{value * factor:.3g} {unit}"
    return f"{value * 1e9:.3g} ns"


def _amount(value: float) -> str:
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.4g} {prefix}"
    return f"{value:.4g} "
