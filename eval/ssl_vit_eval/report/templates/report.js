"use strict";
// A heading of a sortable table becomes a button: first ascending, then descending; what has no number stays last in a column of numbers.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const original = [...body.rows];
  if (original.length < 2) continue;
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, place) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    const numeric = original.some((row) => row.cells[place].dataset.sort !== undefined);
    const value = (row) => {
      const cell = row.cells[place];
      return numeric ? Number(cell.dataset.sort ?? NaN) : cell.textContent;
    };
    button.addEventListener("click", () => {
      const sign = head.ariaSort === "ascending" ? -1 : 1;
      const compare = (a, b) => {
        if (!numeric) return sign * a.localeCompare(b, "en", { numeric: true });
        if (isNaN(a) || isNaN(b)) return isNaN(a) - isNaN(b);
        return a === b ? 0 : sign * (a < b ? -1 : 1);
      };
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
      body.append(...[...original].sort((a, b) => compare(value(a), value(b))));
    });
  });
}
