"use strict";
// Searching and sorting the table of all numbers. Without this script it is there as a whole, by number of users.
(() => {
  const table = document.getElementById("all");
  if (!table) return;
  const first = 100;
  const body = table.tBodies[0];
  const search = document.getElementById("search");
  const verdict = document.getElementById("verdict");
  const more = document.getElementById("more");
  const said = document.getElementById("said");
  const rows = Array.from(body.rows, (row) => ({
    row,
    text: [...row.querySelectorAll(".id")].map((cell) => cell.textContent).concat(row.dataset.type || "").join(" ").toLowerCase(),
    verdict: row.dataset.verdict,
  }));
  let limit = first;

  const show = () => {
    const wanted = search.value.trim().toLowerCase();
    const kind = verdict ? verdict.value : "";
    let matching = 0;
    for (const each of rows) {
      const fits = each.text.includes(wanted) && (!kind || each.verdict === kind);
      each.row.hidden = !fits || matching >= limit;
      if (fits) matching += 1;
    }
    const shown = Math.min(matching, limit);
    said.textContent = `${shown.toLocaleString("en")} of ${rows.length.toLocaleString("en")} rows shown`;
    more.hidden = matching <= limit;
    more.textContent = `Show all ${matching.toLocaleString("en")}`;
  };

  const cell = (each, column) => each.row.cells[column].textContent.trim();
  const sort = (heading, column, numbers) => {
    const before = heading.getAttribute("aria-sort");
    const ascending = before ? before === "descending" : !numbers;
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", ascending ? "ascending" : "descending");
    const keys = new Map(rows.map((each) => {
      const text = cell(each, column);
      return [each, numbers ? Number(text.replaceAll(",", "")) : text];
    }));
    const compare = numbers ? (a, b) => a - b : new Intl.Collator("en", { numeric: true }).compare;
    rows.sort((a, b) => (ascending ? 1 : -1) * compare(keys.get(a), keys.get(b)));
    body.append(...rows.map((each) => each.row));
    show();
  };

  Array.from(table.tHead.rows[0].cells).forEach((heading, column) => {
    if (!heading.dataset.sort) return;
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = heading.textContent;
    heading.replaceChildren(button);
    button.addEventListener("click", () => sort(heading, column, heading.dataset.sort === "number"));
  });
  search.addEventListener("input", show);
  if (verdict) verdict.addEventListener("change", show);
  more.addEventListener("click", () => { limit = Infinity; show(); });
  document.getElementById("tools").hidden = false;
  show();
})();
