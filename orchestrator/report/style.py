"""The style of the page: light and dark, from a phone's width upwards."""

CSS = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1c2024; --soft: #5b646e; --line: #dfe3e8;
  --wash: #f5f7f9; --mark: #0072b2; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --paper: #171a1e; --ink: #e6e8eb; --soft: #a3acb6;
  --line: #333a42; --wash: #1f242a; --mark: #7cc4f0; --bad: #ff9c92; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
main, header, footer { max-width: 76rem; margin: 0 auto; padding: 0 1.25rem; }
header { padding-top: 2rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 2.6rem 0 .6rem; padding-top: .9rem;
  border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.4rem 0 .5rem; }
p { margin: .5rem 0; max-width: 46rem; }
.soft, figcaption, footer, caption { color: var(--soft); font-size: .875rem; }
code { font: .875em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace;
  overflow-wrap: anywhere; }
a { color: var(--mark); }
nav ul { list-style: none; display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; padding: 0;
  margin: .9rem 0 0; }
dl.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(10.5rem, 1fr));
  gap: .7rem; margin: 1.3rem 0 0; }
dl.facts div { background: var(--wash); border: 1px solid var(--line); border-radius: .5rem;
  padding: .65rem .85rem; }
dl.facts dt { color: var(--soft); font-size: .82rem; }
dl.facts dd { margin: 0; font-size: 1.16rem; font-weight: 600;
  font-variant-numeric: tabular-nums; }
dl.facts dd small { display: block; font-size: .82rem; font-weight: 400; color: var(--soft); }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr));
  gap: 1.2rem; }
figure { margin: 0; }
figure img { display: block; max-width: 100%; height: auto; border-radius: .3rem; }
.plot { margin: .8rem 0; }
.plot img { width: 100%; border: 1px solid var(--line); }
.scroll { overflow-x: auto; max-width: 100%; margin: .8rem 0; border: 1px solid var(--line);
  border-radius: .5rem; }
.scroll:focus-visible, a:focus-visible, summary:focus-visible { outline: 2px solid var(--mark);
  outline-offset: 2px; }
table { border-collapse: collapse; width: 100%; font-size: .875rem;
  font-variant-numeric: tabular-nums; }
caption { text-align: left; padding: .6rem .75rem; }
caption span { display: block; position: sticky; left: .75rem; max-width: calc(100vw - 4.5rem); }
th, td { padding: .38rem .7rem; text-align: right; white-space: nowrap;
  border-top: 1px solid var(--line); }
thead th { background: var(--wash); vertical-align: bottom; }
thead th[colspan] { text-align: center; }
th[scope=row], .left { text-align: left; }
th.wrap, td.wrap { white-space: normal; overflow-wrap: anywhere; }
td.wrap { min-width: 12rem; }
.edge { border-left: 1px solid var(--line); }
tr.front td, tr.front th { font-weight: 600; }
tr.front .mark { color: var(--mark); }
.grid td, .grid th { vertical-align: top; text-align: left; padding: .4rem; }
.grid th[scope=row] { white-space: normal; min-width: 5.5rem; max-width: 8rem; }
.grid figure, .grid .none { width: clamp(8.5rem, 12vw, 12rem); }
.grid img { width: 100%; }
.grid figcaption { white-space: normal; font-size: .78rem; line-height: 1.35; margin-top: .25rem; }
.none { color: var(--soft); }
.bad { color: var(--bad); }
details { margin: .9rem 0; }
summary { cursor: pointer; font-weight: 600; }
footer { margin-top: 3rem; padding-bottom: 2.5rem; border-top: 1px solid var(--line);
  padding-top: 1rem; }
@media (max-width: 40rem) { h1 { font-size: 1.4rem; } th, td { padding: .32rem .5rem; } }
@media print { details > * { display: block; } .scroll { overflow: visible; } }
"""
