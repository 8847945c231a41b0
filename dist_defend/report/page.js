for (const table of document.querySelectorAll("table.sheet")) {
  table.querySelectorAll("thead th").forEach((head, column) => {
    const button = document.createElement("button");
    button.append(...head.childNodes);
    head.append(button);
    let sign = -1;
    button.addEventListener("click", () => {
      sign = -sign;
      for (const other of table.querySelectorAll("thead th")) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
      const value = row => {
        const cell = row.cells[column], given = cell.dataset.v;
        const number = parseFloat(given ?? cell.textContent.replace("\u2212", "-"));
        return { number, text: cell.textContent.trim() };
      };
      for (const body of table.tBodies) {
        const rows = [...body.rows].filter(row => !row.classList.contains("group"));
        rows.sort((a, b) => {
          const x = value(a), y = value(b);
          const isX = !Number.isNaN(x.number), isY = !Number.isNaN(y.number);
          if (isX !== isY) return isX ? -1 : 1;
          return sign * (isX ? x.number - y.number : x.text.localeCompare(y.text));
        });
        body.append(...rows);
      }
    });
  });
}
