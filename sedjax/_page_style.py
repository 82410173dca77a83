"""What is the same on every page: its style and its glossary."""

GLOSSARY = """<h2>How to read this page</h2><dl>
<dt>Row, window</dt><dd>A row is the sum of some optimizer steps; a window holds the newest rows, and its singular
values σ₁ ≥ σ₂ ≥ … say how coherent the motion is.</dd>
<dt>Edge, k*, gap ratio</dt><dd>The place of the largest ratio σ_k/σ_(k+1), and that ratio. What is before it is signal,
after it noise.</dd>
<dt>Noise</dt><dd>What an optimizer of the recorded momentum shows on white noise, in rows as long as the recorded
ones, through the same sketch. A ratio exceeds the line less than once in 10⁵ rows of it, where the effective dimension
is many times the window.</dd>
<dt>Phase</dt><dd>Told while training goes on, without hindsight: <i>no edge</i> (within noise), <i>rise</i>,
<i>plateau</i> (at least 0.85 of the peak) and <i>collapse</i>. Runs that never generalize have them, too.</dd>
<dt>Ambiguous</dt><dd>Another place’s ratio is within the sketch’s error of the largest one.</dd>
</dl>"""

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #57606a; --line: #d5dae0; --paper: #fff; --box: #f5f7f9;
  --warn: #8a4b00; --warnbox: #fff6e5; --warnline: #e0a030; --ok: #1a6336; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7eb; --soft: #a3abb5; --line: #3a424c; --paper: #14171b;
  --box: #1c2127; --warn: #f3c877; --warnbox: #2b2314; --warnline: #9a6b17; --ok: #86d4a2; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 17px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
main { max-width: 52rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; overflow-wrap: break-word; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 1.25rem; letter-spacing: -.01em; }
h2 { font-size: 1.3rem; line-height: 1.3; margin: 3rem 0 .75rem; }
h3 { font-size: 1.05rem; margin: 1.75rem 0 .4rem; }
p, ul, dl { margin: .6rem 0; }
ul { padding-left: 1.2rem; }
li { margin: .3rem 0; }
.lead p { margin: .45rem 0; font-size: 1.08rem; }
.lead p:first-child { color: var(--soft); font-size: 1rem; }
.note { border: 1px solid var(--line); border-left: .35rem solid var(--line); border-radius: .4rem;
  padding: .9rem 1.1rem; margin: 1.75rem 0; background: var(--box); }
.note h2 { font-size: 1.05rem; margin: 0 0 .3rem; }
.note p { margin: 0; }
.note.warn { border-color: var(--warnline); background: var(--warnbox); }
.note.warn h2 { color: var(--warn); }
.note.ok h2 { color: var(--ok); }
figure { margin: 1.25rem 0 1.5rem; }
img { display: block; width: 100%; height: auto; background: #fff; border-radius: .3rem; }
figcaption { color: var(--soft); font-size: .88rem; line-height: 1.45; margin-top: .5rem; }
.box { margin: 1rem 0; border: 1px solid var(--line); border-radius: .4rem; }
.scroll { overflow-x: auto;
  background: linear-gradient(90deg, var(--paper) 30%, transparent) 0 / 2.5rem 100% no-repeat local,
    linear-gradient(270deg, var(--paper) 30%, transparent) 100% / 2.5rem 100% no-repeat local,
    linear-gradient(90deg, var(--line), transparent) 0 / .8rem 100% no-repeat scroll,
    linear-gradient(270deg, var(--line), transparent) 100% / .8rem 100% no-repeat scroll; }
@media (min-width: 60rem) { .box.wide { width: min(100vw - 3rem, 74rem); position: relative; left: 50%;
  transform: translateX(-50%); } }
table { border-collapse: collapse; width: 100%; font-size: .88rem; line-height: 1.4;
  font-variant-numeric: tabular-nums; }
.caption { margin: 0; padding: .6rem .75rem; font-weight: 600; font-size: .88rem; line-height: 1.4; }
th, td { padding: .4rem .75rem; text-align: left; vertical-align: top; border-top: 1px solid var(--line); }
th { font-weight: 500; }
thead th { color: var(--soft); white-space: nowrap; }
.n { text-align: right; white-space: nowrap; }
tbody th { min-width: 4rem; max-width: 16rem; overflow-wrap: break-word; }
td { overflow-wrap: anywhere; min-width: 5.5rem; white-space: pre-line; }
.many th, .many td { padding: .4rem .55rem; }
.many td.n { min-width: 0; }
.many tbody th { max-width: 13rem; }
summary { cursor: pointer; }
dt { font-weight: 600; margin-top: .7rem; }
dd { margin: 0; }
:focus-visible { outline: 2px solid #0072b2; outline-offset: 2px; }
@media (max-width: 560px) { body { font-size: 16px; } main { padding: 1.5rem 1rem 3rem; } h1 { font-size: 1.5rem; }
  .few th, .few td { min-width: 0; padding: .4rem .45rem; white-space: normal; }
  .many th:first-child { position: sticky; left: 0; max-width: 7.5rem; background: var(--paper); } }
@media print { main { max-width: none; padding: 0; } .scroll { overflow: visible; }
  figure, tr { break-inside: avoid; } }
"""
