"""The page's style and its few lines of script.

Colour has one meaning each: greys compute, orange is communication (strong where ranks stand still
for it, pale where compute hides it), violet the vote, green the optimizer, blue parameters on their
way. All differ in dark as in light, and by brightness too.
"""

from __future__ import annotations

__all__ = ["SCRIPT", "STYLE"]

STYLE = """
:root{color-scheme:light dark;--paper:#fdfdfb;--ink:#1d1f22;--soft:#5c6168;--rule:#d9dad6;
--grid:#e9e9e5;--forward:#c3c9d1;--backward:#9aa4b1;--on-compute:#1d1f22;--exposed:#d1400f;
--on-exposed:#fff;--hidden:#f6d9c3;--flying:#eb9a5c;--queued:#e7d59a;--filling:#dfe2e6;--sums:#7c4a24;
--vote:#8250c4;--optimizer:#2f8f4e;--publish:#2272b8;--whole:#bcd9ef;--engine:#b9b2a6;
--outside:#e6e3dc;--feature:#a9895a;--card:#f4f4f0}
@media(prefers-color-scheme:dark){:root{--paper:#16181b;--ink:#e7e8ea;--soft:#a3a9b1;
--rule:#383c42;--grid:#26292e;--forward:#4b5563;--backward:#616c7b;--on-compute:#f3f4f6;
--exposed:#f4693a;--on-exposed:#16181b;--hidden:#5c3b24;--flying:#b56a34;--queued:#857431;--filling:#363b42;
--sums:#d69a6c;--vote:#b08cf0;--optimizer:#55b873;--publish:#5aa7ea;--whole:#23445f;
--engine:#6d675d;--outside:#2b2d31;--feature:#a9895a;--card:#1e2125}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.5 system-ui,-apple-system,
"Segoe UI",Roboto,"Liberation Sans",sans-serif;-webkit-text-size-adjust:100%}
main{max-width:1040px;margin:0 auto;padding:28px 20px 60px}
h1{font-size:25px;line-height:1.25;font-weight:650;margin:0 0 6px;letter-spacing:-.01em}
h2{font-size:18px;font-weight:650;margin:44px 0 4px;padding-top:14px;
border-top:1px solid var(--rule)}
p{margin:0 0 12px;max-width:46em}.soft,figcaption,.key{color:var(--soft)}
.facts{color:var(--soft);font-size:14px;margin:0 0 18px}
.loss{border-left:3px solid var(--exposed);padding:6px 12px;background:var(--card);font-size:14px;
margin:0 0 8px}
svg{display:block;overflow:visible;font-size:11px;font-variant-numeric:tabular-nums}
svg text{fill:var(--ink)}svg .tick,svg .soft{fill:var(--soft)}
svg .in{fill:var(--on-compute);pointer-events:none;font-size:11px}
svg .bold{font-weight:650}
svg .grid{stroke:var(--grid)}svg .rule{stroke:var(--rule)}svg .median{stroke:var(--soft);
stroke-dasharray:3 3}svg .lead{stroke:var(--soft)}
.forward{fill:var(--forward)}.backward{fill:var(--backward)}.exposed{fill:var(--exposed)}
.hidden{fill:var(--hidden)}.flying{fill:var(--flying)}.queued{fill:var(--queued)}.filling{fill:var(--filling)}
.sums{fill:var(--sums)}.vote{fill:var(--vote)}.optimizer{fill:var(--optimizer)}
.publish{fill:var(--publish)}.whole{fill:var(--whole)}.engine{fill:var(--engine)}
.outside{fill:var(--outside)}.feature{fill:var(--feature)}.dot{fill:var(--backward)}
.series0{stroke:var(--publish);fill:var(--publish)}.series1{stroke:var(--exposed);
fill:var(--exposed)}.series2{stroke:var(--optimizer);fill:var(--optimizer)}
.series3{stroke:var(--vote);fill:var(--vote)}.series4{stroke:var(--soft);fill:var(--soft)}
.series5{stroke:var(--feature);fill:var(--feature)}
line.series0,line.series1,line.series2,line.series3,line.series4,line.series5{stroke-width:2}
text.series0,text.series1,text.series2,text.series3,text.series4,text.series5{stroke:none}
figure{margin:14px 0 0}figcaption{font-size:13.5px;margin-top:8px;max-width:52em}
.swatch{display:inline-block;width:.8em;height:.8em;border-radius:2px;margin:0 .35em -.06em 0}
.legend{display:flex;flex-wrap:wrap;gap:2px 18px;list-style:none;margin:10px 0 0;padding:0;
font-size:14px}.legend li{white-space:nowrap}.legend b{font-variant-numeric:tabular-nums;
font-weight:600}.legend svg{display:inline-block;width:11px;height:11px;margin:0 6px -1px 0}
.lanes{display:grid;grid-template-columns:40px minmax(0,1fr);gap:0 8px}
.lanes .names{font-size:11px;color:var(--soft);text-align:right;white-space:nowrap}
.lanes .names div{overflow:hidden}
ul{padding-left:1.3em}.legend+details{margin-top:12px}
details{border-top:1px solid var(--grid);padding:6px 0}summary{cursor:pointer;font-size:14px}
summary b{font-weight:650}
.findings{list-style:none;margin:14px 0 0;padding:0}
.findings li{display:grid;grid-template-columns:6.2em minmax(0,1fr);gap:0 16px;
padding:12px 0;border-top:1px solid var(--grid)}.findings li:first-child{border:0}
.findings .cost{text-align:right;font-size:20px;font-weight:650;line-height:1.25;
font-variant-numeric:tabular-nums}.findings .cost small{display:block;font-size:12px;
font-weight:400;color:var(--soft)}.findings p{margin:0 0 4px}
.findings .remedy{color:var(--soft);font-size:14.5px}
table{border-collapse:collapse;margin-top:12px;font-size:13.5px;width:100%;font-variant-numeric:tabular-nums}
th{font-weight:500;color:var(--soft);text-align:right;vertical-align:bottom;padding:4px 8px}
td{text-align:right;padding:4px 8px;border-top:1px solid var(--grid);vertical-align:top}
th.name,td.name{text-align:left;overflow-wrap:anywhere}td.bars{width:22%;min-width:90px;
vertical-align:middle}
code{font:.92em ui-monospace,"Liberation Mono",Menlo,monospace;overflow-wrap:anywhere}
#tip{position:fixed;max-width:min(340px,90vw);background:var(--ink);color:var(--paper);
font-size:12.5px;line-height:1.4;padding:6px 9px;border-radius:4px;pointer-events:none;
display:none;z-index:2;white-space:pre-line}
footer{margin-top:48px;color:var(--soft);font-size:13px}
@media(max-width:620px){main{padding:18px 14px 48px}h1{font-size:21px}h2{font-size:17px}
svg .desk{display:none}.wide{display:none}
.findings li{grid-template-columns:minmax(0,1fr)}.findings .cost{text-align:left}
.findings .cost small{display:inline;margin-left:.5em}
.lanes{grid-template-columns:26px minmax(0,1fr);gap:0 5px}
table,tbody{display:block}thead{display:none}tr{display:grid;padding:8px 0;
grid-template-columns:repeat(3,minmax(0,1fr));border-top:1px solid var(--grid)}
td{display:block;border:0;padding:1px 4px 1px 0;text-align:left}
td::before{content:attr(data-head);display:block;color:var(--soft);font-size:11.5px}
td.name,td.bars{grid-column:1/-1;width:auto}td.bars{order:-1}td.name:first-child{order:-2}td.bars::before,td.name:first-child::before{display:none}}
@media(hover:none){.hover{display:none}}
@media(hover:hover){.touch{display:none}}
"""

SCRIPT = """
(function(){var tip=document.getElementById('tip'),all=document.querySelectorAll('svg title');
for(var i=0;i<all.length;i++){all[i].parentNode.setAttribute('data-hint',all[i].textContent);
all[i].remove()}
function show(e){var hint=e.target.getAttribute&&e.target.getAttribute('data-hint');
if(!hint){tip.style.display='none';return}
tip.textContent=hint;tip.style.display='block';
var w=tip.offsetWidth,h=tip.offsetHeight,x=e.clientX+12,y=e.clientY+14;
if(x+w>innerWidth-8)x=Math.max(8,e.clientX-w-12);if(y+h>innerHeight-8)y=e.clientY-h-12;
tip.style.left=x+'px';tip.style.top=Math.max(8,y)+'px'}
document.addEventListener('pointermove',show);document.addEventListener('pointerdown',show);
document.addEventListener('scroll',function(){tip.style.display='none'},{passive:true})})();
"""
