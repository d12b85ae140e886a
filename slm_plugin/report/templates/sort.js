
(() => {
  "use strict";
  const table = document.getElementById("comparison-table");
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];
  const compare = (a, b, numeric, sign) => {
    // Missing values sort last in both directions.
    if (a === "" || b === "") return (a === "") - (b === "");
    return sign * (numeric ? Number(a) - Number(b) || 0 : a.localeCompare(b, "en", { numeric: true }));
  };
  const sort = (head, column) => {
    const first = head.dataset.better === "higher" ? "descending" : "ascending";
    const turned = { ascending: "descending", descending: "ascending" };
    const order = turned[head.getAttribute("aria-sort")] || first;
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", order);
    const sign = order === "ascending" ? 1 : -1;
    const value = (row) => row.cells[column].dataset.value;
    const numeric = head.dataset.kind === "number";
    body.append(...[...body.rows].sort((a, b) => compare(value(a), value(b), numeric, sign)));
  };
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    button.addEventListener("click", () => sort(head, column));
    head.append(button);
  });
})();
