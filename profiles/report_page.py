"""The report's page in Jinja: a frame with everything inline, autoescaped; no script and nothing fetched. And its parts."""

import jinja2

FRAME = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{{ title }} · {{ kind }}</title>
<style>{{ css }}</style>
</head>
<body>
<main>
{%- for warning in warnings %}
<p class="warning" role="note"><strong>Warning.</strong> {{ warning }}</p>
{%- endfor %}
<header>
<p class="eyebrow">{{ kind }}</p>
<h1>{{ title }}</h1>
<p class="sub">{{ subtitle }}</p>
</header>
{%- block top %}{% endblock %}
{%- for figure in figures %}
<section id="{{ figure.anchor }}">
<h2>{{ figure.title }}</h2>
<p class="words">{{ figure.words }}</p>
{%- if figure.legend %}
<p class="legend">{% for mark, name in figure.legend %}<span>{{ mark }}{{ name }}</span>{% endfor %}</p>
{%- endif %}
<div class="panels of{{ figure.panels | length }}">
{%- for heading, chart in figure.panels %}
<figure><figcaption>{{ heading }}</figcaption>{{ chart }}</figure>
{%- endfor %}
</div>
{{ parts.table(figure.table) }}
</section>
{%- endfor %}
{%- block bottom %}{% endblock %}
</main>
</body>
</html>
"""

REPORT = """{% extends "frame" %}
{% block top %}
<section class="tiles" aria-label="Headline figures">
{%- for tile in tiles %}
<div class="tile"><p class="value">{{ tile.value }}</p><p class="what">{{ tile.what }}</p></div>
{%- endfor %}
</section>
<section class="summary" aria-label="Summary">
<ul>
{%- for sentence in sentences %}
<li>{{ sentence }}</li>
{%- endfor %}
</ul>
</section>
{%- endblock %}
{% block bottom %}
<section id="runs">
<h2>How it was measured</h2>
<p class="words">{{ method }}</p>
{%- for run in runs %}
<h3>{{ run.heading }}</h3>
<div class="run">
{%- for heading, facts in run.parts %}
<div><h4>{{ heading }}</h4>
<dl>
{%- for name, value in facts %}
<dt>{{ name }}</dt><dd>{{ value }}</dd>
{%- endfor %}
</dl></div>
{%- endfor %}
</div>
{%- endfor %}
<h3>The graphs that were measured</h3>
{{ parts.table(subjects) }}
</section>
{% endblock %}"""

PARTS = """{% macro table(data) %}
<details><summary>Table, {{ data.rows | length }} row{{ "s" if data.rows | length > 1 }}</summary>
<div class="scroll"><table>
<thead><tr>
{%- for heading in data.headings %}<th scope="col" class="{{ data.columns[loop.index0] }}">{{ heading }}</th>{% endfor -%}
</tr></thead>
<tbody>
{%- for row in data.rows %}
<tr>{% for value in row %}<td class="{{ data.columns[loop.index0] }}">{{ value }}</td>{% endfor %}</tr>
{%- endfor %}
</tbody>
</table></div></details>{% endmacro %}"""

CSS = """
:root{--page:#f7f7f5;--card:#fff;--ink:#1b1f24;--soft:#5b6470;--line:#e3e5e8;--base:#aab1ba;--accent:#1d4ed8;--alarm:#8a4b00;--alarm-page:#fff4dd;--alarm-line:#e9b949;
--s0:#2563eb;--s1:#b45309;--s2:#047857;--s3:#9333ea;--s4:#be185d;--s5:#0e7490;--s6:#4d7c0f;--s7:#475569;
--weights:#9aa3af;--attention:#2563eb;--matmul:#9aa3af;--other:#d4a72c;--runtime:#cbd0d6}
@media (prefers-color-scheme:dark){:root{--page:#0e1116;--card:#161b22;--ink:#e8ebef;--soft:#9aa4b1;--line:#2a313b;
--base:#566070;--accent:#7aa7ff;--alarm:#ffd98a;--alarm-page:#2b2110;--alarm-line:#7a5a17;--s0:#60a5fa;--s1:#fbbf24;--s2:#34d399;--s3:#c084fc;--s4:#f472b6;--s5:#22d3ee;--s6:#a3e635;
--s7:#94a3b8;--weights:#6b7686;--attention:#60a5fa;--matmul:#6b7686;--other:#d4a72c;--runtime:#465060}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--page);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:1180px;margin:0 auto;padding:40px 24px 72px}
header{margin-bottom:28px}
.eyebrow{margin:0;color:var(--accent);font-size:13px;font-weight:600;letter-spacing:.06em;text-transform:uppercase}
h1{margin:4px 0 2px;font-size:32px;line-height:1.2;letter-spacing:-.015em;overflow-wrap:anywhere}
h2{margin:0 0 4px;font-size:21px;letter-spacing:-.01em}
h3{margin:22px 0 8px;font-size:16px}
h4{margin:0 0 8px;font-size:13px;font-weight:600;color:var(--soft)}
.sub,.words{margin:0;color:var(--soft);max-width:78ch;overflow-wrap:anywhere}
.warning{margin:0 0 26px;padding:12px 18px;border:1px solid var(--alarm-line);border-left-width:5px;border-radius:10px;
background:var(--alarm-page);color:var(--alarm)}
section{margin:0 0 26px}
section[id]{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:22px 24px}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(200px,1fr));gap:14px}
.tile{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:16px 18px}
.value{margin:0;font-size:30px;line-height:1.15;font-weight:650;letter-spacing:-.02em;font-variant-numeric:tabular-nums}
.what{margin:6px 0 0;color:var(--soft);font-size:14px;line-height:1.4}
.summary ul{margin:0;padding-left:20px;columns:2;column-gap:44px}
.summary li{margin:0 0 8px;break-inside:avoid}
.panels{display:grid;grid-template-columns:repeat(3,minmax(0,1fr));gap:22px 30px;margin:18px 0 12px}
.of1{grid-template-columns:minmax(0,1fr)}.of2,.of4{grid-template-columns:repeat(2,minmax(0,1fr))}
figure{margin:0;min-width:0}
figcaption{font-size:14px;font-weight:600;margin:0 0 6px;overflow-wrap:anywhere}
.chart{display:block;overflow:visible}
.chart text{font:12px system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;fill:var(--soft);
font-variant-numeric:tabular-nums}
.chart text.label{font-weight:600;fill:var(--c)}
.chart text.value{font-weight:600;fill:var(--ink)}
.grid{stroke:var(--line);stroke-width:1}
.base{stroke:var(--base);stroke-width:1}
.line{fill:none;stroke:var(--c);stroke-width:2;stroke-linejoin:round;stroke-linecap:round}
.mark,.swatch{fill:var(--c)}
.mark>*:not(.whisker){stroke:var(--card);stroke-width:1.5}
.whisker{fill:none;stroke:var(--c);stroke-width:1.3;opacity:.75}
.hit{fill:transparent;stroke:none!important}
.mark:hover{opacity:.65}
.bar{fill:var(--c);stroke:var(--card);stroke-width:1}
.legend{display:flex;flex-wrap:wrap;gap:4px 18px;margin:12px 0 0;font-size:14px;color:var(--soft)}
.legend span{display:inline-flex;align-items:center;gap:6px;overflow-wrap:anywhere}
.swatch{width:18px;height:14px;flex:none}
.muted{--c:var(--soft)}.weights{--c:var(--weights)}
.b-attention{--c:var(--attention)}.b-matmul{--c:var(--matmul)}.b-other{--c:var(--other)}.b-runtime{--c:var(--runtime)}
.s0{--c:var(--s0)}.s1{--c:var(--s1)}.s2{--c:var(--s2)}.s3{--c:var(--s3)}
.s4{--c:var(--s4)}.s5{--c:var(--s5)}.s6{--c:var(--s6)}.s7{--c:var(--s7)}
details{margin-top:8px;font-size:14px}
summary{cursor:pointer;color:var(--accent)}
.scroll{overflow-x:auto;margin-top:8px}
table{border-collapse:collapse;font-size:13px;font-variant-numeric:tabular-nums}
th,td{padding:5px 18px 5px 0;text-align:left;border-bottom:1px solid var(--line);white-space:nowrap}
th.n,td.n{text-align:right}
th{color:var(--soft);font-weight:600}
.run{display:grid;grid-template-columns:repeat(3,minmax(0,1fr));gap:22px 36px}
dl{display:grid;align-content:start;grid-template-columns:minmax(0,auto) minmax(0,1fr);gap:5px 16px;margin:0;font-size:14px}
dt{color:var(--soft)}
dd{margin:0;min-width:0;overflow-wrap:anywhere}
@media (max-width:900px){.panels,.run{grid-template-columns:minmax(0,1fr)}.summary ul{columns:1}}
@media (max-width:560px){main{padding:24px 14px 48px}h1{font-size:26px}section[id]{padding:16px 14px}
.tiles{grid-template-columns:1fr 1fr;gap:10px}.tile{padding:12px 14px}.value{font-size:24px}
.warning{padding:10px 14px}}
@media print{section{break-inside:avoid}body{background:#fff}}
"""

# Few KV heads are cool, many are hot; light and dark stops of one ramp.
RAMP = (
    ("#0f766e", "#0369a1", "#4338ca", "#a21caf", "#be123c"),
    ("#2dd4bf", "#38bdf8", "#8b93ff", "#e879f9", "#fb7185"),
)


def css(groups: int) -> str:
    """The style sheet with a ramp of `groups` colours, g0 … for the KV-head counts, fewest first."""
    light, dark = ("".join(f"--g{i}:{_mix(stops, i / max(1, groups - 1))};" for i in range(groups)) for stops in RAMP)
    classes = "".join(f".g{i}{{--c:var(--g{i})}}" for i in range(groups))
    return f"{CSS}:root{{{light}}}@media (prefers-color-scheme:dark){{:root{{{dark}}}}}{classes}"


def _mix(stops: tuple[str, ...], at: float) -> str:
    """The colour at `at` in 0 … 1 of a ramp of evenly spaced stops."""
    index = min(int(at * (len(stops) - 1)), len(stops) - 2)
    part = at * (len(stops) - 1) - index
    pairs = [(int(stops[index][i : i + 2], 16), int(stops[index + 1][i : i + 2], 16)) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(a + (b - a) * part):02x}" for a, b in pairs)


def environment() -> jinja2.Environment:
    """Its templates: `frame`, whose figures are report_figures.Figure, and `report`, the latency report in that frame."""
    loader = jinja2.DictLoader({"frame": FRAME, "report": REPORT, "parts": PARTS})
    made = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    made.globals["parts"] = made.get_template("parts").module
    return made
