"""How a page of replays looks, in light and dark, and the little that it does where one points."""

TINTS = 8
"""Of plans; then they come again."""
STYLE = (
    """
:root{--ink:#1b1f24;--soft:#5b6570;--paper:#fff;--raised:#f6f7f9;--rule:#e3e6ea;--best:#e7f2ec;
--s0:#0072b2;--s1:#d55e00;--s2:#009e73;--s3:#b0589c;--s4:#b58900;--s5:#3d9fd6;--s6:#555;--s7:#8a5a2b;
--t0:#d7e3ee;--t1:#f3e2cf;--t2:#d9ebe0;--t3:#e9dcea;--t4:#f4ecc4;--t5:#e0e0e0;--t6:#cfe8ec;--t7:#ecd9cf;
--spot:#8fbbdc;--dear:#e2a86b;--wait:#d55e00;--loss:#c0392b}
@media(prefers-color-scheme:dark){:root{--ink:#e6e8eb;--soft:#9aa4af;--paper:#14171b;--raised:#1c2026;--rule:#2d333b;--best:#1f3a2c;
--s0:#56b4e9;--s1:#f0803c;--s2:#2fc79a;--s3:#d996c9;--s4:#e6c84f;--s5:#a9d8f5;--s6:#b5b5b5;--s7:#c79a6b;
--t0:#27394a;--t1:#48371f;--t2:#23402f;--t3:#40304a;--t4:#454018;--t5:#3c3c3c;--t6:#1f434a;--t7:#4a3126;
--spot:#2f5f86;--dear:#8a5a22;--wait:#f0803c;--loss:#ff7a6b}}
*{box-sizing:border-box}
body{font:15px/1.55 system-ui,-apple-system,"Segoe UI",sans-serif;color:var(--ink);background:var(--paper);
max-width:1180px;margin:0 auto;padding:1.6em 1.4em 4em}
h1{font-size:1.7em;line-height:1.2;margin:0 0 .2em}h2{font-size:1.2em;margin:2.2em 0 .3em}
p{margin:.3em 0 .8em;max-width:62em}.soft,figcaption{color:var(--soft)}figcaption{font-size:13px;margin-top:.2em}
figure{margin:.4em 0 .8em}svg{display:block;width:100%;height:auto}.pair{display:grid;grid-template-columns:1fr 1fr;gap:0 1.4em}
@media(max-width:760px){.pair{grid-template-columns:1fr}}
summary{cursor:pointer;font-weight:600;padding:.35em 0}details{border-top:1px solid var(--rule)}
svg text{font:11.5px system-ui,-apple-system,"Segoe UI",sans-serif;fill:var(--ink)}
svg .tick,svg .quiet,svg .axis{fill:var(--soft)}svg .panel{font-weight:600;font-size:12px}svg .on-band{font-size:11px}
svg .factor{font-size:10.5px;fill:var(--soft)}svg .label{font-weight:600}
.grid{stroke:var(--rule);stroke-width:1}
.line{fill:none;stroke-width:2.2;stroke-linejoin:round}.mark{stroke:var(--paper);stroke-width:1.2}.spread{stroke-width:1.4}
.spot{fill:var(--spot)}.on-demand{fill:var(--dear)}.serving{fill:none;stroke:var(--ink);stroke-width:1.8}
.planned{fill:none;stroke:var(--ink);stroke-width:1.2;stroke-dasharray:3 3}
.dots{fill:none;stroke:var(--s0);stroke-width:3.4;stroke-linecap:round;opacity:.55}
.p50{fill:none;stroke:var(--s0);stroke-width:1.6}.p99{fill:none;stroke:var(--s1);stroke-width:1.2}
.lost-request{fill:none;stroke:var(--loss);stroke-width:1.8}
.in-flight{fill:var(--spot)}.waiting{fill:var(--wait)}.notice{fill:var(--soft)}
line.lost{stroke:var(--loss);stroke-width:1;stroke-dasharray:4 3;opacity:.6}
line.taken{stroke:var(--loss);stroke-width:1.3;opacity:.85}
.touch{fill:transparent}.cross{stroke:var(--ink);stroke-width:1;pointer-events:none}
.band{stroke:var(--paper)}
"""
    + "".join(f".t{n}{{fill:var(--t{n})}}" for n in range(TINTS))
    + "".join(f".line.s{n},.spread.s{n}{{stroke:var(--s{n})}}.mark.s{n},.bar.s{n}{{fill:var(--s{n})}}" for n in range(8))
    + """
.legend{display:flex;flex-wrap:wrap;gap:.2em 1.2em;margin:.6em 0;position:sticky;top:0;background:var(--paper);
padding:.3em 0;z-index:1}
.legend label{display:flex;align-items:center;gap:.4em;cursor:pointer;font-size:14px}
.legend .sample{width:34px;height:16px}
.key{display:flex;flex-wrap:wrap;gap:.2em 1.2em;font-size:13px;color:var(--soft);margin:.2em 0 .6em}
.key span{display:flex;align-items:center;gap:.4em}.key svg{width:26px;height:12px;flex:none}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:14px;font-variant-numeric:tabular-nums;min-width:40%}
th,td{padding:.28em .8em;text-align:right;border-bottom:1px solid var(--rule);white-space:nowrap}
th:first-child,td:first-child{text-align:left;position:sticky;left:0;background:var(--paper)}
thead th{border-bottom:2px solid var(--soft)}tbody th{padding-top:1.1em;font-weight:600}
td.best{background:var(--best);font-weight:600}
.config td{text-align:left;white-space:normal;overflow-wrap:anywhere}
pre{background:var(--raised);padding:.8em 1em;overflow-x:auto;font-size:13px;border-radius:6px}
.readout{font-size:13px;color:var(--soft);min-height:1.6em;font-variant-numeric:tabular-nums}
"""
)

SCRIPT = """
document.querySelectorAll('.legend input').forEach(function(box){box.addEventListener('change',function(){
document.querySelectorAll('g[data-case="'+box.dataset.case+'"]').forEach(function(g){g.style.display=box.checked?'':'none'})})});
function clock(s){var d=Math.floor(s/86400),h=Math.floor(s/3600)%24,m=Math.floor(s/60)%60,r=Math.floor(s%60);
return (d?d+' d ':'')+(d||h?h+' h ':'')+(d||h||m?m+' min ':'')+r+' s'}
document.querySelectorAll('svg.time').forEach(function(picture){
var told=JSON.parse(picture.dataset.of),axis=told.axis,line=picture.querySelector('.cross'),
out=picture.parentNode.querySelector('.readout');
function say(v,u){return v===null?'none':v+(u||'')}
picture.addEventListener('mousemove',function(e){var box=picture.getBoundingClientRect(),
x=(e.clientX-box.left)/box.width*picture.viewBox.baseVal.width,t=(x-axis[0])/(axis[1]-axis[0])*axis[2],b=told.bins[Math.floor(t/axis[3])];
if(t<0||!b){return}line.setAttribute('x1',x);line.setAttribute('x2',x);line.setAttribute('visibility','visible');
out.textContent=clock(t)+': machines '+say(b[0])+', end to end p50 '+say(b[1],' s')+', p99 '+say(b[2],' s')+
', in flight '+say(b[3])+
', without a token '+say(b[4])});
picture.addEventListener('mouseleave',function(){line.setAttribute('visibility','hidden');out.textContent=''})});
"""
