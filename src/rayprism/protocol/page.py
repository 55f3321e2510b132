"""The documentation page: one HTML file that loads nothing from elsewhere.

The script builds the page with DOM calls from the OpenAPI document, so that nothing in the
document can become markup. The page's own policy allows only this script and this style sheet.
"""

from __future__ import annotations

import base64
import hashlib
import html

__all__ = ["docs_page"]

_STYLE = """
:root {
  color-scheme: light dark;
  --ground: #f6f7f9; --card: #ffffff; --ink: #17202b; --soft: #556274; --line: #dde2ea;
  --accent: #2647c8; --accent-ink: #ffffff; --code: #eef1f6; --good: #0f6b3c; --bad: #a91e2c;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ground: #10141b; --card: #181e28; --ink: #e7ebf2; --soft: #a2aebf; --line: #2c3544;
    --accent: #9db4ff; --accent-ink: #10141b; --code: #10151e; --good: #6cd69b; --bad: #ff949d;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--ground); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
}
.skip { position: absolute; left: -9999px; }
.skip:focus { left: 1rem; top: 1rem; background: var(--card); padding: .5rem 1rem; z-index: 1; }
.band { height: 6px; background: linear-gradient(90deg, #d7263d, #f49d37, #f2e94e, #3bb273,
  #2a7de1, #7b4bd0); }
header, main, footer { max-width: 62rem; margin: 0 auto; padding: 0 1.25rem; }
header { padding-top: 2rem; padding-bottom: 1rem; }
h1 { margin: 0; font-size: 1.9rem; letter-spacing: -.02em; }
h2 { margin: 0; font-size: 1.35rem; letter-spacing: -.01em; overflow-wrap: anywhere; }
h3 { margin: 1.5rem 0 .5rem; font-size: 1rem; }
p { margin: .4rem 0; }
.soft { color: var(--soft); }
nav ul { list-style: none; display: flex; flex-wrap: wrap; gap: .5rem; margin: 1rem 0 0;
  padding: 0; }
nav a {
  display: block; padding: .2rem .8rem; border: 1px solid var(--line); border-radius: 99px;
  background: var(--card); text-decoration: none;
}
a { color: var(--accent); }
:focus-visible { outline: 3px solid var(--accent); outline-offset: 2px; }
section {
  background: var(--card); border: 1px solid var(--line); border-radius: 12px;
  padding: 1.25rem 1.5rem 1.5rem; margin: 1.25rem 0;
}
.title { display: flex; flex-wrap: wrap; align-items: baseline; gap: .3rem .75rem; }
.badge {
  font-size: .8rem; padding: .05rem .6rem; border-radius: 99px; border: 1px solid var(--line);
  color: var(--soft); white-space: nowrap;
}
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .93rem; }
th, td { text-align: left; vertical-align: top; padding: .4rem .8rem .4rem 0;
  border-bottom: 1px solid var(--line); }
th { font-weight: 600; color: var(--soft); font-size: .82rem; }
code, pre, textarea { font-family: ui-monospace, "SF Mono", Menlo, Consolas, monospace;
  font-size: .86rem; line-height: 1.5; }
td code { white-space: nowrap; }
pre, textarea {
  background: var(--code); color: var(--ink); border: 1px solid var(--line); border-radius: 8px;
  padding: .75rem 1rem; margin: 0; width: 100%;
}
pre { overflow: auto; max-height: 24rem; white-space: pre-wrap; overflow-wrap: anywhere; }
textarea { min-height: 11rem; resize: vertical; }
label { display: block; font-weight: 600; font-size: .93rem; margin-bottom: .35rem; }
.row { display: flex; flex-wrap: wrap; gap: .75rem; align-items: center; margin: .6rem 0; }
button {
  font: inherit; font-weight: 600; padding: .4rem 1.1rem; border-radius: 8px; cursor: pointer;
  border: 1px solid var(--accent); background: var(--accent); color: var(--accent-ink);
}
button.quiet { background: transparent; color: var(--accent); }
button:disabled { opacity: .6; cursor: progress; }
.good { color: var(--good); font-weight: 600; }
.bad { color: var(--bad); font-weight: 600; }
.method { font-weight: 700; }
summary { cursor: pointer; font-weight: 600; }
footer { padding-top: .5rem; padding-bottom: 3rem; font-size: .88rem; }
"""

_SCRIPT = """
"use strict";
(() => {
  const page = document.getElementById("page");
  const source = new URL(page.dataset.document, document.baseURI);

  function make(tag, attributes, ...children) {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes || {})) {
      node.setAttribute(name, value);
    }
    for (const child of children) {
      node.append(child);
    }
    return node;
  }

  function shapeText(shape) {
    return "[" + shape.map((size) => (size === -1 ? "any" : size)).join(", ") + "]";
  }

  function table(caption, columns, rows) {
    const head = make("tr", {}, ...columns.map((name) => make("th", { scope: "col" }, name)));
    const body = rows.map((cells) => make("tr", {}, ...cells.map((cell) => make("td", {}, cell))));
    return make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": caption },
      make("table", {}, make("thead", {}, head), make("tbody", {}, ...body)));
  }

  function tensorTable(caption, tensors) {
    return table(caption, ["Name", "Datatype", "Shape", "Description"], tensors.map((tensor) => {
      const notes = [tensor.description, tensor.allowNan === false ? "(NaN is refused)" : ""];
      return [make("code", {}, tensor.name), make("code", {}, tensor.datatype),
        make("code", {}, shapeText(tensor.shape)), notes.filter(Boolean).join(" ")];
    }));
  }

  function curl(address, text) {
    const quoted = "'" + text.replaceAll("'", "'\\\\''") + "'";
    return "curl -sS '" + address + "' \\\\\\n  -H 'Content-Type: application/json' \\\\\\n  -d "
      + quoted;
  }

  // Lays JSON out without parsing it: parsing would round whole numbers above 2 ** 53.
  function readable(text) {
    const open = [];
    let laid = "";
    let quoted = false;
    const line = () => "\\n" + "  ".repeat(open.filter((kind) => kind === "{").length);
    for (let at = 0; at < text.length; at += 1) {
      const sign = text[at];
      if (quoted) {
        laid += sign;
        if (sign === "\\\\") {
          at += 1;
          laid += text[at] ?? "";
        } else if (sign === '"') {
          quoted = false;
        }
      } else if (sign === "{" || sign === "[") {
        open.push(sign);
        laid += sign + (sign === "{" ? line() : "");
      } else if (sign === "}" || sign === "]") {
        open.pop();
        laid += (sign === "}" ? line() : "") + sign;
      } else if (sign === ",") {
        laid += sign + (open.at(-1) === "{" ? line() : " ");
      } else {
        quoted = sign === '"';
        laid += sign + (sign === ":" ? " " : "");
      }
    }
    return laid;
  }

  async function copy(text, status) {
    try {
      await navigator.clipboard.writeText(text);
      status.textContent = "Copied.";
    } catch (error) {
      status.textContent = "The browser does not allow copying here; select the text instead.";
    }
  }

  function tryForm(model, index, address, command) {
    const id = "request-" + index;
    const area = make("textarea", { id, spellcheck: "false", autocomplete: "off" });
    area.value = model.exampleText;
    area.addEventListener("input", () => {
      command.textContent = curl(address, area.value);
    });
    const send = make("button", { type: "submit" }, "Send");
    const reset = make("button", { type: "button", class: "quiet" }, "Reset");
    const status = make("span", { role: "status" });
    const answer = make("pre", { tabindex: "0", "aria-label": "Answer" });
    answer.hidden = true;
    reset.addEventListener("click", () => {
      area.value = model.exampleText;
      area.dispatchEvent(new Event("input"));
      answer.hidden = true;
      status.textContent = "";
    });
    const form = make("form", {}, make("label", { for: id }, "Request"), area,
      make("div", { class: "row" }, send, reset, status), answer);
    form.addEventListener("submit", async (event) => {
      event.preventDefault();
      send.disabled = true;
      status.className = "soft";
      status.textContent = "Sending\\u2026";
      const started = performance.now();
      try {
        const response = await fetch(address, {
          method: "POST", headers: { "Content-Type": "application/json" }, body: area.value,
        });
        const text = await response.text();
        const took = (performance.now() - started).toFixed(1);
        status.className = response.ok ? "good" : "bad";
        // Of split traffic any version may have answered.
        const version = response.headers.get("x-rayprism-version");
        status.textContent = response.status + (version ? " from version " + version : "")
          + " in " + took + " ms";
        answer.textContent = readable(text);
      } catch (error) {
        status.className = "bad";
        status.textContent = "No answer.";
        answer.textContent = String(error);
      }
      answer.hidden = false;
      send.disabled = false;
    });
    return form;
  }

  function modelSection(model, index, base) {
    const address = base + model.inferPath;
    const title = make("div", { class: "title" }, make("h2", {}, model.name),
      make("span", { class: "badge" }, "version " + model.version));
    if (model.platform) {
      title.append(make("span", { class: "badge" }, model.platform));
    }
    if (!model.isDefault) {
      title.append(make("span", { class: "badge" }, "only by its version"));
    }
    const command = make("pre", { tabindex: "0", "aria-label": "curl command" });
    command.textContent = curl(address, model.exampleText);
    const copied = make("span", { role: "status", class: "soft" });
    const button = make("button", { type: "button", class: "quiet" }, "Copy");
    button.addEventListener("click", () => copy(command.textContent, copied));
    const section = make("section", { id: "model-" + index }, title);
    if (model.description) {
      section.append(make("p", {}, model.description));
    }
    section.append(make("p", { class: "soft" }, "POST ", make("code", {}, model.inferPath)),
      make("h3", {}, "Inputs"), tensorTable("Inputs of " + model.name, model.inputs),
      make("h3", {}, "Outputs"), tensorTable("Outputs of " + model.name, model.outputs),
      make("h3", {}, "Try it"));
    if (!model.exampleIsReal) {
      section.append(make("p", { class: "soft" },
        "There is no short example for this model: fill in data."));
    }
    section.append(tryForm(model, index, address, command), make("h3", {}, "From a shell"),
      command, make("div", { class: "row" }, button, copied));
    return section;
  }

  function endpoints(paths) {
    const rows = [];
    for (const [path, item] of Object.entries(paths)) {
      for (const [method, operation] of Object.entries(item)) {
        rows.push([make("span", { class: "method" }, method.toUpperCase()),
          make("code", {}, path), operation.summary || ""]);
      }
    }
    return make("section", { id: "endpoints" }, make("h2", {}, "Endpoints"),
      table("Endpoints", ["Method", "Path", "What it tells"], rows));
  }

  function errors(responses) {
    const rows = Object.entries(responses).map(([name, response]) => [
      make("code", {}, name.replace("Error", "")), response.description]);
    return make("section", { id: "errors" }, make("h2", {}, "Errors"),
      make("p", {}, "The body of an error is ", make("code", {}, '{"error": "what was wrong"}'),
        "."), table("Errors", ["Status", "Meaning"], rows));
  }

  function show(api) {
    const server = new URL((api.servers && api.servers[0].url) || "/", source);
    const base = server.href.replace(/\\/+$/, "");
    const models = api["x-rayprism-models"] || [];
    document.getElementById("about").textContent =
      api.info.summary + " \\u00b7 " + api.info.title + " " + api.info.version;
    const list = document.getElementById("models");
    models.forEach((model, index) => {
      const name = model.name + " " + model.version;
      list.append(make("li", {}, make("a", { href: "#model-" + index }, name)));
    });
    list.append(make("li", {}, make("a", { href: "#endpoints" }, "Endpoints")),
      make("li", {}, make("a", { href: "#errors" }, "Errors")));
    const parts = models.map((model, index) => modelSection(model, index, base));
    if (!models.length) {
      parts.push(make("section", {}, make("p", {}, "No model is served yet.")));
    }
    page.replaceChildren(...parts, endpoints(api.paths), errors(api.components.responses));
  }

  fetch(source)
    .then((response) => {
      if (!response.ok) {
        throw new Error("status " + response.status);
      }
      return response.json();
    })
    .then(show)
    .catch((error) => {
      page.replaceChildren(make("section", { role: "alert" },
        make("p", { class: "bad" }, "The description of the server could not be read."),
        make("p", {}, String(error.message))));
    });
})();
"""

_PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>rayprism: models</title>
<link rel="icon" href="data:,">
<style>{style}</style>
</head>
<body>
<a class="skip" href="#page">Skip to the models</a>
<div class="band"></div>
<header>
<h1>rayprism</h1>
<p class="soft" id="about">Models behind the Open Inference Protocol v2</p>
<nav aria-label="On this page"><ul id="models"></ul></nav>
</header>
<main id="page" data-document="{document}"><p role="status">Loading&hellip;</p>
<noscript><p>This page needs JavaScript. The same is in
<a href="{document}">the OpenAPI document</a>.</p></noscript></main>
<footer class="soft">Made from <a href="{document}">the OpenAPI document</a>, which other tools can
read, too.</footer>
<script>{script}</script>
</body>
</html>
"""


def _digest(text: str) -> str:
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return f"'sha256-{digest}'"


_POLICY = (
    f"default-src 'none'; script-src {_digest(_SCRIPT)}; style-src {_digest(_STYLE)}; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'"
)


def docs_page(document_url: str) -> str:
    """The documentation page.

    Args:
        document_url: Where the browser gets the OpenAPI document, on the same origin; a relative
            address is taken from the page's own.

    Returns:
        A whole HTML document.
    """
    return _PAGE.format(
        policy=html.escape(_POLICY),
        style=_STYLE,
        script=_SCRIPT,
        document=html.escape(document_url),
    )
