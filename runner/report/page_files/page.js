"use strict";
// Sorts and filters tables. Without it, the page has the same content in the order of the report.
(() => {
  const compare = new Intl.Collator(undefined, { numeric: true }).compare;
  const read = (body, at) => {
    const cell = body.rows[0].cells[at];
    if (cell === undefined) return "";
    const text = cell.dataset.v ?? cell.textContent.trim();
    const number = Number(text.replace(/[,−]/g, (mark) => (mark === "−" ? "-" : "")));
    return text === "" || Number.isNaN(number) ? text : number;
  };
  const order = (a, b) => {
    if (a === "" || b === "") return (a === "") - (b === ""); // blanks stay last
    if (typeof a === "number" && typeof b === "number") return a - b;
    return compare(String(a), String(b));
  };
  const sort = (table, at, heads) => {
    const head = heads[at];
    const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    for (const other of heads) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", sign === 1 ? "ascending" : "descending");
    const keyed = [...table.tBodies].map((body) => [read(body, at), body]);
    keyed.sort(([a], [b]) => (a === "" || b === "" ? order(a, b) : sign * order(a, b)));
    table.append(...keyed.map(([, body]) => body));
  };
  for (const table of document.querySelectorAll("table.sortable")) {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, at) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      button.addEventListener("click", () => sort(table, at, heads));
      head.append(button);
    });
    if (table.tBodies.length < 6) continue;
    const label = document.createElement("label");
    const input = document.createElement("input");
    const shown = document.createElement("output");
    label.className = "filter";
    input.type = "search";
    input.placeholder = "all of these words";
    label.append("Filter ", input, " ", shown);
    let texts;
    input.addEventListener("input", () => {
      texts ??= [...table.tBodies].map((body) => [body, body.textContent.toLowerCase()]);
      const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
      let number = 0;
      for (const [body, text] of texts) {
        body.hidden = !words.every((word) => text.includes(word));
        number += body.hidden ? 0 : 1;
      }
      shown.textContent = words.length ? `${number} of ${texts.length}` : "";
    });
    table.parentElement.before(label);
  }
})();
