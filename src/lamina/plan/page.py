"""A report as one HTML file: no scripts, no other files, no addresses to load from."""

from __future__ import annotations

from html import escape

from lamina.plan.plots import PLOTS, svg
from lamina.plan.report import Report, Row

COLUMNS = (
    "plan", "tokens/s", "simulated", "TTFT ms", "TBT ms", "batch", "$/h", "$/Mtoken",
    "link GB/s", "limited by",
)  # fmt: skip
"""Of the ranked table; of the link what is needed and what there is."""

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem;
       color: #222; background: #fff; }
table { border-collapse: collapse; font-size: 13px; }
th, td { border-bottom: 1px solid #ddd; padding: .3rem .6rem; text-align: right;
         vertical-align: top; }
th:nth-child(2), td:nth-child(2), td:nth-child(11), th:nth-child(11) { text-align: left; }
.verdict { padding: .8rem 1rem; border-left: 4px solid #228833; background: #f3f8f3; }
.verdict.no { border-color: #aa3333; background: #fbf4f4; }
.warning { color: #8a4b00; }
svg { max-width: 100%; height: auto; }
"""


def cells(row: Row) -> tuple[str, ...]:
    """A row of the table, in the order of `COLUMNS`."""
    link = "-"
    if row.needed_link_bytes_per_s is not None and row.link_bytes_per_s is not None:
        link = f"{row.needed_link_bytes_per_s / 1e9:.1f}/{row.link_bytes_per_s / 1e9:.1f}"
    price, per_token = row.price_per_hour, row.price_per_million_tokens
    return (
        row.plan,
        f"{row.tokens_per_s:.0f}",
        "-" if row.simulated is None else f"{row.simulated.tokens_per_s:.0f}",
        f"{1e3 * row.ttft_s:.0f}",
        f"{1e3 * row.tbt_s:.1f}",
        f"{row.batch:.0f}",
        "-" if price is None else f"{price:.2f}",
        "-" if per_token is None else f"{per_token:.2f}",
        link,
        row.limit,
    )


def html(report: Report) -> str:
    """
    Raises:
        ConfigError: matplotlib is not installed.
    """
    head = "".join(f"<th>{escape(column)}</th>" for column in ("", *COLUMNS))
    body = "\n".join(
        "<tr>" + "".join(f"<td>{escape(c)}</td>" for c in (str(number), *cells(row))) + "</tr>"
        for number, row in enumerate(report.rows, 1)
    )
    remarks = "\n".join(
        [f'<p class="warning">Warning: {escape(text)}</p>' for text in report.warnings]
        + [f"<p>Note: {escape(text)}</p>" for text in report.notes]
    )
    pictures = "\n".join(f"<figure>{svg(draw, report)}</figure>" for draw in PLOTS.values())
    title = f"{escape(report.model)} on {escape(report.inventory)}"
    return f"""<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style></head>
<body>
<h1>{title}</h1>
<p>Workload: {escape(report.workload)}. Ranked by {report.rank}; {report.num_estimated} deployments
were estimated. TTFT counts from when a request has its place; times are means.</p>
<p class="verdict{"" if report.pays else " no"}">{escape(report.verdict)}</p>
<table><thead><tr>{head}</tr></thead>
<tbody>
{body}
</tbody></table>
{remarks}
{pictures}
</body>
</html>
"""
