"""The style sheet of a report: light, dark, narrow and printed."""

from __future__ import annotations

# Hues from Okabe and Ito (2008), apart for most colour-blind readers, here less saturated. Stages
# have hues that no kind of work has, so that a colour means one thing on the whole page.
STYLE = """
:root { color-scheme: light dark;
  --page: #fff; --text: #1d2530; --muted: #5c6775; --line: #d9dfe6; --panel: #f6f8fa;
  --F: #3a74b4; --B: #d07a2c; --other: #98a2ae; --REDUCE: #2f9477; --input: #c9a227;
  --wait: #c3cbd5; --measured: #3a74b4; --predicted: #8d98a6; --good: #1f7a4d; --bad: #b3261e;
  --s0: #0f7c86; --s1: #8a5aa8; --s2: #6f7d1f; --s3: #b24a6b; --s4: #4a5a9a; --s5: #8a6236; }
@media screen and (prefers-color-scheme: dark) { :root {
  --page: #14181d; --text: #e3e8ee; --muted: #9ba7b4; --line: #323b45; --panel: #1b2127;
  --F: #5f9ad6; --B: #e0954f; --other: #77828f; --REDUCE: #45b394; --input: #d9b94a;
  --wait: #4a5561; --measured: #5f9ad6; --predicted: #7d8997; --good: #5fc491; --bad: #f2837a;
  --s0: #3fb3bd; --s1: #b78bd4; --s2: #a9b84e; --s3: #dd7f9e; --s4: #8797dc; --s5: #c39a6a; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif;
  overflow-wrap: anywhere; -webkit-print-color-adjust: exact; print-color-adjust: exact; }
main { max-width: 1120px; margin: 0 auto; padding: 28px 28px 48px; }
h1 { font-size: 26px; line-height: 1.25; margin: 0 0 2px; }
h2 { font-size: 18px; margin: 40px 0 10px; padding-top: 14px; border-top: 1px solid var(--line); }
h3 { font-size: 14px; margin: 18px 0 6px; }
p { margin: 0 0 8px; } ul { margin: 0; padding: 0; list-style: none; }
.note, .kind { color: var(--muted); font-size: 13px; }
.verdict { border-left: 5px solid var(--muted); background: var(--panel); margin: 16px 0;
  padding: 12px 16px; border-radius: 4px; }
.verdict p { margin: 0; } .verdict p + p { margin-top: 4px; }
.verdict.good { border-color: var(--good); } .verdict.bad { border-color: var(--bad); }
.good b.word, td .good, .tile .good { color: var(--good); }
.bad b.word, td .bad, .tile .bad { color: var(--bad); }
.tiles, .charts, .uses { display: grid; gap: 14px; }
.tiles { grid-template-columns: repeat(auto-fit, minmax(min(100%, 220px), 1fr)); }
.charts { grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); }
.uses { grid-template-columns: repeat(auto-fill, minmax(min(100%, 310px), 1fr)); }
.charts > *, .uses > *, .tiles > * { min-width: 0; }
.tile { border: 1px solid var(--line); border-radius: 6px; padding: 10px 14px; }
.tile .what { color: var(--muted); font-size: 13px; } .tile p { margin: 0; }
.tile .value { font-size: 23px; font-weight: 600; line-height: 1.35; }
.tile .more { font-size: 13px; }
figure { margin: 0; } figcaption { font-size: 13px; margin-bottom: 2px; }
.scroll { overflow-x: auto; max-width: 100%; }
svg { display: block; width: 100%; height: auto; }
svg text { font: 12px system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif;
  fill: var(--text); stroke: var(--page); stroke-width: 3px; paint-order: stroke; }
svg .strong { font-weight: 600; font-size: 13px; } svg .muted { fill: var(--muted); }
svg .middle { text-anchor: middle; } svg .end-text { text-anchor: end; }
svg .inside { text-anchor: middle; fill: var(--page); font-size: 11px; stroke: none;
  pointer-events: none; }
svg .grid { stroke: var(--line); } svg .end { stroke: var(--text); stroke-dasharray: 3 3; }
svg .bound { stroke: var(--bad); stroke-width: 1.5; }
svg .expected { stroke: var(--predicted); stroke-width: 1.5; stroke-dasharray: 5 4; }
svg .level { stroke: var(--muted); stroke-dasharray: 2 3; }
svg .curve { fill: none; stroke-width: 2; } svg .curve.measured { stroke: var(--measured); }
svg .area.measured { fill: var(--measured); opacity: .75; }
svg .area.predicted { fill: var(--predicted); opacity: .75; }
svg .mean { stroke: var(--text); stroke-dasharray: 4 3; }
.F { fill: var(--F); background: var(--F); } .B { fill: var(--B); background: var(--B); }
.other { fill: var(--other); background: var(--other); }
.SEND_F { fill: var(--F); background: var(--F); opacity: .6; }
.SEND_B { fill: var(--B); background: var(--B); opacity: .6; }
.REDUCE_GRAD { fill: var(--REDUCE); background: var(--REDUCE); opacity: .75; }
.input { fill: var(--input); background: var(--input); }
.wait { fill: var(--wait); } .swatch.wait { background: var(--wait); }
svg rect.F, svg rect.B { stroke: var(--page); stroke-width: .5; }
.dot.front { fill: var(--page); stroke: var(--predicted); stroke-width: 2; }
.dot.ran { fill: var(--predicted); stroke: var(--text); stroke-width: 2; }
.dot.measured { fill: var(--measured); stroke: var(--page); } .dot.small { stroke: none; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 18px; font-size: 13px; margin: 2px 0 10px; }
.swatch { display: inline-block; width: 20px; height: 14px; margin-right: 6px; border-radius: 2px;
  vertical-align: -2px; }
.swatch.network { height: 8px; vertical-align: 1px; } .swatch.wait { height: 4px;
  vertical-align: 3px; }
.swatch.solid.measured { background: var(--measured); }
.swatch.busy, .part.busy { background: var(--F); }
.swatch.idle, .part.idle { background: var(--wait); }
.swatch.radio, .part.radio { background: var(--input); }
.swatch.whole, .part.whole { background: var(--other); }
.s0 { --stage: var(--s0); } .s1 { --stage: var(--s1); } .s2 { --stage: var(--s2); }
.s3 { --stage: var(--s3); } .s4 { --stage: var(--s4); } .s5 { --stage: var(--s5); }
svg rect.s0, svg rect.s1, svg rect.s2, svg rect.s3, svg rect.s4, svg rect.s5 {
  fill: var(--stage); }
.badge { background: var(--stage); color: var(--page); border-radius: 3px; padding: 1px 6px;
  font-size: 12px; font-weight: 600; white-space: nowrap; }
.cluster { display: grid; gap: 22px; }
.cluster > * { min-width: 0; }
.cluster.joined { overflow: hidden; padding-left: 14px; }
.joined > * { position: relative; }
.joined > *::before { content: ""; position: absolute; left: -14px; top: -9000px;
  bottom: calc(100% - 18px); border-left: 2px solid var(--muted); }
.joined > *::after { content: ""; position: absolute; left: -14px; top: 17px; width: 14px;
  border-top: 2px solid var(--muted); }
.joined > .between::before, .joined > .between::after { left: -15px; }
/* Hides the end of the spine above the first bar. */
.joined > :first-child::before { top: -1px; height: 18px; bottom: auto; width: 4px; border: 0;
  background: var(--page); z-index: 1; }
.bus { background: var(--panel); border: 1px solid var(--line); border-bottom: 3px solid
  var(--muted); border-radius: 5px 5px 0 0; padding: 6px 12px; font-size: 13.5px; }
.bus.switch { border-bottom-style: dashed; }
.bus b { margin-right: 6px; }
.between { border: 1px dashed var(--muted); border-radius: 5px; padding: 6px 12px;
  font-size: 13.5px; }
.between p { color: var(--muted); margin: 0; }
.between ul { display: flex; flex-wrap: wrap; gap: 2px 22px; }
/* A device hangs from its medium on a line that reaches up past all rows; the grid cuts it off. */
.cells { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 238px), 1fr));
  overflow: hidden; padding-left: 12px; }
.cell { position: relative; padding: 14px 12px 0 18px; display: flex; }
.cell::before { content: ""; position: absolute; left: 0; top: -4000px; bottom: calc(100% - 36px);
  border-left: 2px solid var(--muted); }
.cell::after { content: ""; position: absolute; left: 0; top: 35px; width: 18px;
  border-top: 2px solid var(--muted); }
.apart .cell::before, .apart .cell::after { content: none; }
.card, .box { border: 1px solid var(--line); border-radius: 6px; padding: 9px 12px; flex: 1;
  background: var(--page); font-size: 13px; min-width: 0; }
.card p, .box p { margin: 0 0 2px; } .card .name { font-weight: 600; font-size: 14.5px; }
.card .role { margin: 3px 0 4px; }
.card.stage, .box.stage { border-left: 5px solid var(--stage); }
.card.out, .card.guest { border-style: dashed; background: var(--panel); color: var(--muted); }
.card.guest { flex: 0 1 auto; }
.card .ports { border-top: 1px dotted var(--line); margin-top: 5px; padding-top: 4px; }
.pipeline { display: flex; flex-wrap: wrap; gap: 8px; align-items: stretch; }
.box { flex: 1 1 190px; }
.arrow { align-self: center; text-align: center; color: var(--muted); line-height: 1.1;
  font-size: 19px; }
.arrow span { display: block; font-size: 11.5px; }
.facts { display: grid; grid-template-columns: max-content 1fr; gap: 2px 16px; margin: 14px 0 0;
  font-size: 14px; }
.facts dt { color: var(--muted); } .facts dd { margin: 0; }
table { border-collapse: collapse; font-size: 14px; margin: 6px 0; overflow-wrap: normal; }
th, td { padding: 4px 20px 4px 0; text-align: left; border-bottom: 1px solid var(--line);
  vertical-align: top; }
th { color: var(--muted); font-weight: 500; font-size: 13px; }
td { font-variant-numeric: tabular-nums; } td small { color: var(--muted); }
.bounds td { min-width: 92px; }
.plans td:nth-child(2) { min-width: 180px; } .figures td:first-child { min-width: 150px; }
.energy { display: grid; gap: 10px; }
.energy h3 { margin: 0 0 2px; }
.bar { display: grid; grid-template-columns: 82px minmax(60px, 1fr) 290px; gap: 10px;
  align-items: center; font-size: 13px; }
.bar .what { color: var(--muted); }
.bar .track { display: flex; height: 15px; background: var(--panel); border-radius: 2px; }
.bar .part { height: 100%; }
.bar.predicted .part { opacity: .6; }
.gone { border: 1px dashed var(--line); border-radius: 5px; padding: 8px 12px; color: var(--muted);
  font-size: 14px; margin: 6px 0; }
footer { margin-top: 40px; padding-top: 14px; border-top: 1px solid var(--line); font-size: 13px;
  color: var(--muted); }
@media (max-width: 640px) { main { padding: 16px 14px 32px; }
  .facts { grid-template-columns: 1fr; } .facts dd { margin-bottom: 6px; }
  .bar { grid-template-columns: 74px 1fr; gap: 0 8px; margin-bottom: 4px; }
  .bar .value { grid-column: 2; }
  .pipeline { flex-direction: column; } .box { flex-basis: auto; }
  .arrow { transform: rotate(90deg); } }
@media print { main { max-width: none; padding: 0; } h2 { break-after: avoid; }
  .card, .tile, .box, figure, tr, .bar, .verdict { break-inside: avoid; }
  .scroll { overflow: visible; } svg { min-width: 0 !important; } }
"""
