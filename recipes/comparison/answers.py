"""The seven questions, answered with the numbers that a grid has; what it does not have is said to be not measured."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from scipy import stats

from comparison.grid import BASELINE, matched_name
from comparison.intervals import Interval, interval, paired, paired_ratio
from comparison.results import Outcome, Results, amount, at_by_seed, by_seed
from comparison.runs import NORMS

WHEN = {"over training": "from epoch to end", "end": "end"}  # of question 3
NOT_MEASURED = "Not measured: this grid has no runs for it."


@dataclass
class Table:
    """Cells of text."""

    header: Sequence[str]
    rows: list[Sequence[str]] = field(default_factory=list)


@dataclass
class Answer:
    """One question, what was found, and what would have shown the contrary."""

    question: str
    contrary: str
    findings: list[str] = field(default_factory=list)
    tables: list[tuple[str, Table]] = field(default_factory=list)  # each under a caption


def answers(results: Results) -> list[Answer]:
    """All of them, in order."""
    return [
        generalisation(results),
        tightness(results),
        each_other(results),
        coefficients(results),
        initialisation(results),
        implicit(results),
        lazy(results),
    ]


def generalisation(results: Results) -> Answer:
    """Question 1."""
    answer = Answer(
        "Does each penalty improve generalisation, and by how much, at matched epochs and at matched compute?",
        "an interval of the paired difference that contains 0 or lies below it.",
    )
    if len(results.tasks) > 1:
        answer.tables.append(
            ("Test accuracy, percent, ± half of the 95 % t-interval over seeds.", _accuracies(results))
        )
    for task in results.tasks:
        best = results.best_baseline(task)
        table = Table(
            (
                "method", "chosen", "seeds", "test accuracy", "train − test", f"minus {BASELINE}",
                f"minus {best or 'best baseline'}", "minus plain, matched compute", "cost", "collapsed or diverged",
            )
        )  # fmt: skip
        compared = {method: _compare(results, task, method, best) for method in results.methods(task, matched=True)}
        table.rows += [row for row, _ in compared.values()]
        answer.tables.append(
            (f"{task}. Percent and percentage points, ± half of the 95 % t-interval over seeds.", table)
        )
        answer.findings += _verdicts(task, {method: compared[method][1] for method in results.penalties(task)})
    return answer


def _accuracies(results: Results) -> Table:
    """Methods by data."""
    methods = dict.fromkeys(method for task in results.tasks for method in results.methods(task, matched=True))
    ordered = [method for method in results.grid.methods if method in methods]
    table = Table(("method", *results.tasks))
    for method in ordered + sorted(methods.keys() - set(ordered)):
        accuracies = [_percent(by_seed(results.of(task, method), "test_accuracy")) for task in results.tasks]
        table.rows.append((method, *(_plus_minus(interval(list(values.values()))) for values in accuracies)))
    return table


def _compare(
    results: Results, task: str, method: str, best: str | None
) -> tuple[Sequence[str], dict[str, Interval | None]]:
    """One row of the table, and the differences in it."""
    runs = results.of(task, method)
    accuracy = _percent(by_seed(runs, "test_accuracy"))
    gaps = {one.seed: 100 * one.gap for one in runs if one.gap is not None}
    references = {"none": BASELINE, "best": best, "matched": _matched(results, task, method)}
    differences = {
        name: None
        if reference is None or reference == method
        else paired(accuracy, _percent(by_seed(results.of(task, reference), "test_accuracy")))
        for name, reference in references.items()
    }
    bad = sum(one.result["collapsed"] or one.record["status"] == "diverged" for one in runs)
    row = (
        method,
        amount(runs[0], next(iter(results.of(task, BASELINE)), None), results.candidates(task, method))
        if runs
        else "–",
        str(len(runs)),
        _plus_minus(interval(list(accuracy.values()))),
        _plus_minus(interval(list(gaps.values()))),
        *(_plus_minus(difference, signed=True) for difference in differences.values()),
        f"{runs[0].result['cost']:.2f} ×" if runs else "–",
        str(bad),
    )
    return row, differences


def _matched(results: Results, task: str, method: str) -> str | None:
    """The plain baseline that was given as much compute as a method."""
    costs = {other: runs[0].result["cost"] for other in results.methods(task) if (runs := results.of(task, other))}
    factor = results.grid.factors(costs, results.described(task)).get(method)
    return None if factor is None else matched_name(factor)


def _verdicts(task: str, differences: Mapping[str, Mapping[str, Interval | None]]) -> list[str]:
    """Which penalties are better than no penalty, at matched epochs and at matched compute, and which are not."""
    sentences = []
    for name, what in (("none", "At matched epochs"), ("matched", "At matched compute")):
        found = {method: named[name] for method, named in differences.items() if named[name] is not None}
        if not found:
            sentences.append(f"{task}. {what}: not measured.")
            continue
        groups: dict[str, list[str]] = {"better": [], "no difference shown": [], "worse": []}
        for method, difference in found.items():
            groups[_sign(difference)].append(f"`{method}` {_plus_minus(difference, signed=True)}")
        said = "; ".join(f"{group}: {', '.join(members)}" for group, members in groups.items() if members)
        sentences.append(f"{task}. {what}, in points of test accuracy: {said}.")
    return sentences


def _sign(difference: Interval | None) -> str:
    if difference is None or difference.low is None or difference.high is None:
        return "no difference shown"
    return "better" if difference.low > 0 else "worse" if difference.high < 0 else "no difference shown"


def tightness(results: Results) -> Answer:
    """Question 2."""
    answer = Answer(
        "How tight is the bound, by layer, at initialisation and over training, and under which penalty?",
        "a tightness above 1 beyond rounding (a violation), or a tightness that does not depend on the penalty.",
    )
    for task in results.tasks:
        runs_of = {method: results.of(task, method) for method in results.methods(task)}
        layers: list[str] = next((runs[0].layers() for runs in runs_of.values() if runs), [])
        table = Table(
            (
                "method", "start", "first epoch", "end", *(f"{layer}, start → end" for layer in layers),
                *(f"{norm}, end" for norm in NORMS),
            )
        )  # fmt: skip
        for method, runs in runs_of.items():
            table.rows.append(
                (
                    method,
                    *(_mean(at_by_seed(runs, when, "tightness").values()) for when in ("start", "epoch", "end")),
                    *(
                        " → ".join(
                            _mean(at_by_seed(runs, when, "tightness", layer).values()) for when in ("start", "end")
                        )
                        for layer in layers
                    ),
                    *(_mean(_rungs(runs, norm)) for norm in NORMS),
                )
            )
        answer.tables.append((f"{task}. Means over the probe and over seeds.", table))
        ends = {method: list(at_by_seed(runs, "end", "tightness").values()) for method, runs in runs_of.items()}
        known = {method: statistics.fmean(values) for method, values in ends.items() if values}
        if known:
            loosest, tightest = min(known, key=known.__getitem__), max(known, key=known.__getitem__)
            answer.findings.append(
                f"{task}. After training the bound is loosest under `{loosest}` ({known[loosest]:.3f}) and tightest under "
                f"`{tightest}` ({known[tightest]:.3f})."
            )
    watched = [one for one in results.all if one.history]
    checks = [row for one in watched for row in one.rows()]
    violations = sum(row["violations"] for row in checks)
    answer.findings.append(f"Violations in {len(checks):,} checks of {len(watched):,} runs: {violations}.")
    return answer


def _rungs(runs: Sequence[Outcome], norm: str) -> list[float]:
    found = [(one.result["ladder"].get("end") or {}).get(norm) for one in runs]
    return [value for value in found if value is not None]


def each_other(results: Results) -> Answer:
    """Question 3."""
    answer = Answer(
        "Does the parameter penalty shrink ‖∇_x f‖² without being told to, as the inequality suggests, and the reverse?",
        "ratios to training without penalty (same seed) at or above 1.",
    )
    named = {"‖∇_x f‖²": ("input_grad_sq_norm", "param"), "‖∇_θ f‖²": ("param_grad_sq_norm", "input")}
    for task in results.tasks:
        table = Table(("method", *(f"{name}, {when}" for name in named for when in WHEN), "‖J‖_F² of the outputs, end"))
        plain = results.of(task, BASELINE)
        for method in results.methods(task):
            if method == BASELINE:
                continue
            runs = results.of(task, method)
            complexity = paired_ratio(by_seed(runs, "geometric_complexity"), by_seed(plain, "geometric_complexity"))
            ratios = {
                name: [
                    paired_ratio(at_by_seed(runs, when, column), at_by_seed(plain, when, column))
                    for when in WHEN.values()
                ]
                for name, (column, _) in named.items()
            }
            table.rows.append(
                (method, *(_ratio(one) for found in ratios.values() for one in found), _ratio(complexity))
            )
            for name, (_, told) in named.items():
                if runs and runs[0].settings["penalty"] == told and None not in ratios[name]:
                    mean, end = map(_ratio, ratios[name])
                    said = f"{task}. Under `{method}`, {name} is {mean} × as large over training, {end} × at the end"
                    beside = f"; ‖J‖_F² of the outputs {_ratio(complexity)} ×" if told == "param" else ""
                    answer.findings.append(f"{said}{beside}.")
        answer.tables.append(
            (
                f"{task}. Relative to {BASELINE}: geometric means over seeds [95 % interval], of the checks from the first "
                "epoch to the last, and of the last. Once the training images are fitted, gradients of their loss vanish, "
                "and their ratios compare how well they are; those of the outputs do not.",
                table,
            )
        )
    if not answer.findings:
        answer.findings.append(NOT_MEASURED)
    return answer


def coefficients(results: Results) -> Answer:
    """Question 4."""
    answer = Answer(
        "The source argues that ‖h‖, ‖W‖ and ‖∇_x h‖ hardly move, so that the penalties are roughly proportional: by how "
        "much do the coefficients move, in the first epoch and after it?",
        "for the argument, factors near 1 in every layer, and one ratio of the two penalties throughout training.",
    )
    for task in results.tasks:
        runs_of = {method: runs for method in results.methods(task) if (runs := results.of(task, method))}
        layers: list[str] = next((runs[0].layers() for runs in runs_of.values()), [])
        changes = Table(("method", *layers))
        levels = Table(("method", "Σ_t c_t", "‖∇_θ f‖² / ‖∇_x f‖²"))
        for method, runs in runs_of.items():
            moved = [_moved(runs, layer) for layer in layers]
            changes.rows.append((method, *(" · ".join(map(_ratio, pair)) for pair in moved)))
            levels.rows.append((method, *(_levels(runs, over) for over in ("lhs", "rhs"))))
            if method == BASELINE:
                said = "; ".join(
                    f"{layer} {' and '.join(map(_ratio, pair))}" for layer, pair in zip(layers, moved, strict=True)
                )
                answer.findings.append(f"{task}. Without penalty, factors in the first epoch and after it: {said}.")
        answer.tables.append(
            (
                f"{task}. Factors by which (1+‖h‖²)/(‖W‖²‖J‖²) changes in the first epoch · after it, by layer: geometric "
                "means over seeds [95 % interval].",
                changes,
            )
        )
        answer.tables.append(
            (f"{task}. What the penalties' ratio is at the start → after the first epoch → at the end.", levels)
        )
    if not answer.findings:
        answer.findings.append(NOT_MEASURED)
    return answer


def _moved(runs: Sequence[Outcome], layer: str) -> tuple[Interval | None, Interval | None]:
    """Logarithms of the factors by which a coefficient changes, in the first epoch and after it."""
    start, epoch, end = (at_by_seed(runs, when, "coefficient", layer) for when in ("start", "epoch", "end"))
    return paired_ratio(epoch, start), paired_ratio(end, epoch)


def _levels(runs: Sequence[Outcome], side: str) -> str:
    """One side of the bound in units of ‖∇_x f‖², over training."""
    cells = []
    for when in ("start", "epoch", "end"):
        ratio = paired_ratio(at_by_seed(runs, when, side), at_by_seed(runs, when, "input_grad_sq_norm"))
        cells.append("–" if ratio is None else _number(ratio.exp()[0]))
    return " → ".join(cells)


def initialisation(results: Results) -> Answer:
    """Question 5."""
    answer = Answer(
        "‖W‖₂ at initialisation is not near 0: how large is it for PyTorch's default, He, Xavier and orthogonal "
        "initialisation, with the activation's gain?",
        "spectral norms far below 1.",
    )
    groups = _groups(results.sweep(5))
    if not groups:
        answer.findings.append(NOT_MEASURED)
        return answer
    layers = next(iter(groups.values()))[0].layers()
    table = Table(("case", "seeds", *(f"{layer}, start → end" for layer in layers)))
    smallest: tuple[float, str, str] | None = None
    for case, runs in groups.items():
        cells = []
        for layer in layers:
            start, end = (at_by_seed(runs, when, "weight_norm", layer) for when in ("start", "end"))
            cells.append(f"{_mean(start.values())} → {_mean(end.values())}")
            for value in start.values():
                smallest = min(smallest or (value, case, layer), (value, case, layer))
        table.rows.append((case, str(len(runs)), *cells))
    answer.tables.append(("‖W_t‖₂ by layer, means over seeds.", table))
    if smallest is not None:
        answer.findings.append(
            f"The smallest ‖W_t‖₂ at initialisation is {smallest[0]:.3f} ({smallest[1]}, layer {smallest[2]})."
        )
    return answer


def implicit(results: Results) -> Answer:
    """Question 6."""
    answer = Answer(
        "Implicit regularisation: with plain SGD and no penalty, do larger learning rates end with smaller ‖∇_x f‖² and "
        "smaller geometric complexity? And with the explicit lr/4 · ‖∇_θ L‖² at a small rate?",
        "a rank correlation with the learning rate at or above 0.",
    )
    groups = _groups(results.sweep(6))
    if not groups:
        answer.findings.append(NOT_MEASURED)
        return answer
    table = Table(
        ("case", "epochs", "seeds", "‖∇_x f‖²", "‖∇_θ L‖²", "geometric complexity", "train accuracy", "test accuracy")
    )
    for case, runs in groups.items():
        table.rows.append(
            (
                case,
                str(runs[0].settings["epochs"]),
                str(len(runs)),
                _mean(at_by_seed(runs, "end", "input_grad_sq_norm").values()),
                _mean(at_by_seed(runs, "end", "batch_grad_sq_norm").values()),
                _mean(by_seed(runs, "geometric_complexity").values()),
                *(
                    _plus_minus(interval([100 * value for value in by_seed(runs, f"{part}_accuracy").values()]))
                    for part in ("train", "test")
                ),
            )
        )
    answer.tables.append(("After training. ‖J‖_F² of the outputs is the geometric complexity.", table))
    plain = [one for runs in groups.values() for one in runs if not one.has_penalty]
    quantities: dict[str, Callable[[Outcome], float | None]] = {
        "‖∇_x f‖²": lambda one: one.at("end", "input_grad_sq_norm"),
        "geometric complexity": lambda one: one.result["geometric_complexity"],
    }
    for name, value in quantities.items():
        pairs = [(one.settings["lr"], found) for one in plain if (found := value(one)) is not None]
        if len({lr for lr, _ in pairs}) < 2:
            answer.findings.append(f"{name}: not measured at several learning rates.")
            continue
        correlation = stats.spearmanr(*zip(*pairs, strict=True))
        answer.findings.append(
            f"Rank correlation of the learning rate with {name} after training, without penalty: "
            f"{correlation.statistic:+.2f} ({len(pairs)} runs)."
        )
    return answer


def lazy(results: Results) -> Answer:
    """Question 7."""
    answer = Answer(
        "Does lazy regularisation (every n-th step) keep the accuracy?",
        "an interval of the paired difference that lies below 0.",
    )
    table = Table(("data", "method", "minus", "points", "cost", "instead of"))
    for task in results.tasks:
        for method in results.methods(task):
            full = results.grid.methods[method].get("like")
            runs = results.of(task, method)
            if full is None or not runs or runs[0].settings["every_n_steps"] == 1 or not results.of(task, full):
                continue
            reference = results.of(task, full)
            difference = paired(_percent(by_seed(runs, "test_accuracy")), _percent(by_seed(reference, "test_accuracy")))
            costs = [f"{one[0].result['cost']:.2f} ×" for one in (runs, reference)]
            table.rows.append((task, method, full, _plus_minus(difference, signed=True), *costs))
            points = f"{_plus_minus(difference, signed=True)} points"
            answer.findings.append(
                f"{task}. `{method}` against `{full}`: {points} at a cost of {costs[0]} instead of {costs[1]}."
            )
    if table.rows:
        answer.tables.append(("Paired by seed.", table))
    else:
        answer.findings.append(NOT_MEASURED)
    return answer


def _groups(outcomes: Sequence[Outcome]) -> dict[str, list[Outcome]]:
    """The runs of a sweep, case by case."""
    groups: dict[str, list[Outcome]] = {}
    for one in outcomes:
        groups.setdefault(one.method, []).append(one)
    return groups


def _percent(values: Mapping[int, float]) -> dict[int, float]:
    return {seed: 100 * value for seed, value in values.items()}


def _plus_minus(found: Interval | None, *, signed: bool = False) -> str:
    """``93.42 ± 0.15``; one seed has no interval, and says so."""
    if found is None:
        return "–"
    mean = f"{found.mean:+.2f}" if signed else f"{found.mean:.2f}"
    return f"{mean} (one seed)" if found.half is None else f"{mean} ± {found.half:.2f}"


def _ratio(found: Interval | None) -> str:
    if found is None:
        return "–"
    mean, low, high = found.exp()
    return _number(mean) if low is None or high is None else f"{_number(mean)} [{_number(low)}, {_number(high)}]"


def _mean(values: Iterable[float]) -> str:
    found = list(values)
    return _number(statistics.fmean(found)) if found else "–"


def _number(value: float) -> str:
    """Three digits, and no powers of ten where a reader wants none."""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e7 else f"{value:.3g}"
