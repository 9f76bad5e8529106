"""What a page is made of beside its figures: its frame, its style and its script. All of it is inline; nothing is loaded."""

from __future__ import annotations

__all__ = ["FRAGMENT_STYLE", "PAGE", "SCRIPT"]

PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; \
script-src 'unsafe-inline'; img-src data:">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark }}
body {{ margin: 2rem auto; max-width: 72rem; padding: 0 1rem; font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif }}
</style>
</head>
<body>
{body}
</body>
</html>
"""

# Colours are mixed from the page's own, so that they fit the ground of a notebook, light or dark.
FRAGMENT_STYLE = """
.revhooks h2 { margin: 0; font-size: 1.3em; overflow-wrap: anywhere }
.revhooks h3 { margin: 1.6em 0 .4em; font-size: 1.05em }
.revhooks .rv-where, .revhooks .rv-note { margin: .2em 0; opacity: .7; font-size: .9em }
.revhooks .rv-answer { margin: .8em 0; max-width: 60em; font-size: 1.1em }
.revhooks pre { margin: .5em 0; padding: .5em .8em; border-left: 3px solid #0072b2; white-space: pre-wrap }
.revhooks pre { background: rgba(128, 128, 128, .12) }
.revhooks .rv-wide { overflow-x: auto }
.revhooks table { border-collapse: collapse; font-size: .92em; line-height: 1.35 }
.revhooks th, .revhooks td { padding: .3em .7em; text-align: left; vertical-align: top; overflow-wrap: break-word }
.revhooks th, .revhooks td { border-bottom: 1px solid rgba(128, 128, 128, .3) }
.revhooks td:first-child { min-width: 11em }
.revhooks ol { margin: .5em 0; padding-left: 2em; font-size: .92em }
.revhooks th { white-space: nowrap }
.revhooks th button { all: unset; cursor: pointer; font-weight: 600 }
.revhooks th button:focus-visible { outline: 2px solid #0072b2 }
.revhooks th[aria-sort=ascending] button::after { content: " \\25b4" }
.revhooks th[aria-sort=descending] button::after { content: " \\25be" }
.revhooks td.rv-number, .revhooks th.rv-number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums }
.revhooks .rv-best { font-weight: 700 }
.revhooks .rv-problem { opacity: .8 }
.revhooks .rv-bar { position: relative; min-width: 8em }
.revhooks .rv-bar i, .revhooks .rv-bar b { position: absolute; left: 0; top: .5em; height: .8em; background: #0072b2 }
.revhooks .rv-bar i { opacity: .3 }
.revhooks figure { margin: .5em 0 }
.revhooks dl { display: grid; grid-template-columns: max-content auto; gap: .1em 1.5em; margin: 0 }
.revhooks dd { margin: 0; font-variant-numeric: tabular-nums }
"""

# A click on a heading sorts, figures from the largest, names from A; another turns it round; what has no figure stays last.
SCRIPT = """
document.querySelectorAll(".revhooks:not([data-live])").forEach(root => {
  root.dataset.live = "";
  root.querySelectorAll("th button").forEach(button => button.addEventListener("click", () => {
    const head = button.parentNode, heads = [...head.parentNode.children], at = heads.indexOf(head);
    const body = head.closest("table").tBodies[0], rows = [...body.rows];
    const value = row => row.cells[at] && "v" in row.cells[at].dataset ? row.cells[at].dataset.v : "";
    const numbers = rows.every(row => value(row) === "" || !isNaN(value(row)));
    const before = head.getAttribute("aria-sort");
    const down = before ? before === "ascending" : numbers;
    const compare = (a, b) => numbers ? a - b : a.localeCompare(b, undefined, {numeric: true});
    rows.sort((a, b) => {
      const [x, y] = [value(a), value(b)];
      if (x === "" || y === "") return (x === "") - (y === "");
      return down ? compare(y, x) : compare(x, y);
    });
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    body.append(...rows);
  }));
  const pick = root.querySelector("select");
  if (pick) pick.addEventListener("change", () => root.querySelectorAll("figure[data-choice]").forEach(figure => {
    figure.hidden = figure.dataset.choice !== pick.value;
  }));
});
"""
