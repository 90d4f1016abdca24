"""The report of plan.py in words, for people."""

from collections.abc import Iterable, Sequence

from evlm_jax.parallel.chips import GIB
from evlm_jax.parallel.compiler import told

VERDICTS = {True: "fits", False: "does not fit", None: "cannot be"}


def show(report: dict) -> str:
    """A page on one program."""
    mesh = " ".join(f"{axis}={size}" for axis, size in report["mesh"].items())
    policies = " ".join(f"{name}={value}" for name, value in report["policies"].items())
    arguments = [
        (name, f"{share['count']:,}", _gib(share["bytes"]))
        for name, share in report["arguments"].items()
    ]
    lines = [
        (
            f"{report['config']}, {report['what']}, phase {report['phase']}, {report['rows']} rows"
            f" on {report['topology']}"
        ),
        f"mesh {mesh}; {policies}",
        *([told(report["options"])] if report["options"] else []),
        "",
        *table(("arguments", "count", "GiB a device"), arguments),
        "",
    ]
    lines += _fitting(report) if report["fits"] else _not_fitting(report)
    seconds = (
        f"traced in {report['lower_seconds']:.0f} s, compiled in {report['compile_seconds']:.0f} s"
    )
    return "\n".join([*lines, f"{seconds}, {report['ram_gib']:.1f} GiB of RAM"])


def _fitting(report: dict) -> list[str]:
    memory, devices = report["memory"], report["devices"]
    size = f" of {_gib(report['chip']['hbm'] / report['chip']['cores'])}" if report["chip"] else ""
    lines = [
        f"memory a device{size} GiB: "
        + ", ".join(f"{name} {_gib(bytes_)}" for name, bytes_ in memory.items())
    ]
    lines += [
        "what fills it at the fullest moment (an estimate):",
        *_buffers(report["largest"]),
        *_padding(report["padding"]),
        "",
    ]
    lines += table(
        ("TFLOP of all devices", "needed", "executed", "of it again", "ratio", "s by cycles"),
        _parts(report, devices),
    ) + [""]
    lines += [*_again(report, devices), ""]
    rows = [
        (c["kind"], c["group"], f"{c['count']:,.0f}", _gib(c["bytes"]), _gib(c["sent"]))
        for c in report["collectives"]
    ]
    lines += table(("collectives of a device", "group", "count", "GiB", "GiB sent"), rows) + [""]
    lines += [f"note: {what} ({count:,.0f})" for what, count in report["notes"].items()]
    lines.append(f"bytes through HBM, an estimate: {_gib(report['bytes'])} GiB a device")
    return lines + (_time(report["time"]) if "time" in report else [])


def _parts(report: dict, devices: int) -> list[tuple]:
    seconds = report.get("time", {}).get("cycles", {}).get("parts", {})
    rows, totals = [], [0.0] * 4
    for part in dict.fromkeys((*report["needed"], *report["executed"], *seconds)):
        need = sum(report["needed"].get(part, {}).values())
        done = {name: flops * devices for name, flops in report["executed"].get(part, {}).items()}
        values = need, sum(done.values()), done.get("again", 0.0), seconds.get(part, 0.0)
        totals = [a + b for a, b in zip(totals, values)]
        rows.append((part, *values))

    def tera(x):
        return f"{x / 1e12:,.1f}"

    return [
        (
            part,
            tera(need),
            tera(done),
            tera(again),
            f"{done / need:.2f}" if need else "",
            f"{took:.3f}" if seconds else "",
        )
        for part, need, done, again, took in [*rows, ("all", *totals)]
    ]


def _again(report: dict, devices: int) -> list[str]:
    """What a pass visits, and what is computed again, each by itself."""
    lines = [
        f"{part}: a pass visits "
        + ", ".join(
            f"{count[name] / count['visible']:.2f} ({name})"
            for name in ("forward", "backward")
            if name in count
        )
        + f" of {count['visible']:,.0f} visible positions"
        for part, count in report["scores"].items()
    ]
    need = sum(sum(cost.values()) for cost in report["needed"].values())
    passes = report["executed"].values()
    once = devices * sum(done["forward"] + done["backward"] for done in passes)
    again = devices * sum(done["again"] for done in passes)
    return [
        *lines,
        f"executed / needed FLOPs: {once / need:.2f}, with recomputation"
        f" {(once + again) / need:.2f}",
    ]


def _padding(padding: dict) -> list[str]:
    """What the chip's tiled layouts add."""
    return [
        f"padded by the chip's layouts: {name} {_gib(size['logical'])} to {_gib(size['bytes'])} GiB"
        for name, size in padding.items()
    ]


def _time(time: dict) -> list[str]:
    made = ", ".join(f"{name} {time[name]:.3f}" for name in ("products", "hbm", "ici", "dcn"))
    lines = [
        (
            f"a step takes at least {time['seconds']:.3f} s ({made}; all overlapped"
            f" {time['bound']:.3f}): {time['binds']} binds"
        ),
        (
            f"{time['tokens_per_s']:,.0f} tokens/s, {time['images_per_s']:,.0f} images/s,"
            f" {100 * time['mfu']:.0f}% of the peak by needed FLOPs"
        ),
    ]
    if modelled := time.get("cycles"):
        lines.append(_modelled(modelled))
    if "days" in time:
        price = f", {time['price']:,.0f} to pay" if "price" in time else ""
        lines.append(
            f"{time['steps']:,} steps: {time['days']:,.1f} days, {time['chip_days']:,.0f}"
            f" chip-days{price}"
        )
    return lines


def _modelled(modelled: dict) -> str:
    """What the TPU compiler's own cycles say of a step."""
    working, exposed, hidden = (
        sum(modelled[name].values()) for name in ("parts", "exposed", "hidden")
    )
    return (
        f"by the compiler's own cycles {modelled['seconds']:.3f} s, {100 * modelled['mfu']:.0f}% of"
        f" the peak: operations {working:.3f} ({modelled['guessed']:.3f} of them by the roofline,"
        f" for it has no estimate), transfers that nothing hides {exposed:.3f}, beside operations"
        f" {hidden:.3f}"
    )


def _not_fitting(report: dict) -> list[str]:
    lines = [f"does not fit: {report['says'].splitlines()[0]}"]
    if found := report.get("largest"):
        lines += [
            f"compiled for {found['topology']} it takes {_gib(found['memory']['peak'])} GiB a"
            " device at its fullest; the largest:"
        ]
        lines += _buffers(found["buffers"])
    for tried in report.get("tried", ()):
        lines.append(f"{tried['change']}: {VERDICTS[tried['fits']]}")
        if tried["fits"]:
            lines += [
                (
                    f"it then takes {_gib(tried['memory']['peak'])} GiB a device at its fullest;"
                    " the largest:"
                ),
                *_buffers(tried["largest"]),
            ]
    return lines


def _buffers(buffers: list[dict]) -> list[str]:
    return [
        f"  {_gib(b['bytes']):>8} GiB  {b['count']} x {b['shape']}  {b['where']}" for b in buffers
    ]


def _gib(size: float) -> str:
    return f"{size / GIB:,.2f}"


def table(head: Sequence, rows: Iterable[Sequence]) -> list[str]:
    """Lines in columns, the first to the left, all others to the right."""
    cells = [[str(cell) for cell in row] for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    return [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths))
        ).rstrip()
        for row in cells
    ]
