"use strict";
// Heat maps: switch between measures, point at a cell or move with the arrow keys to read it.
for (const section of document.querySelectorAll("section.heat")) {
  const data = JSON.parse(section.querySelector("script").textContent);
  const cellOf = (measure, row, column) => [data.measures[measure].cells[row][column]].flat();
  const rows = [...section.querySelectorAll("tbody tr")].map((row) => [...row.querySelectorAll("td")]);
  const table = section.querySelector("table");
  const told = section.querySelector(".told");
  const title = section.querySelector("h2").textContent;

  const show = (number) => {
    table.setAttribute("aria-label", `${title}: ${data.measures[number].name}`);
    rows.forEach((cells, row) => cells.forEach((cell, column) => {
      const [text, shade, bad] = cellOf(number, row, column);
      cell.className = text === null ? "none" : bad ? "bad" : "";
      cell.textContent = text;
      if (typeof shade === "number") cell.style.setProperty("--h", shade);
      else cell.style.removeProperty("--h");
    }));
  };
  const tell = (row, column) => {
    const texts = data.measures.map(({ name }, number) => [name, cellOf(number, row, column)[0]]);
    const known = texts.filter(([, text]) => text !== null);
    if (!known.length) return;
    const where = `${data.rows[row]} ${data.columns[column]}`.trim();
    told.textContent = `${where}: ${known.map((pair) => pair.join(" ")).join(", ")}`;
  };
  const focus = (row, column) => {
    const cell = rows[row] && rows[row][column];
    if (!cell) return;
    rows.flat().forEach((other) => other.setAttribute("tabindex", "-1"));
    cell.setAttribute("tabindex", "0");
    cell.focus();
  };
  const steps = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
  rows.forEach((cells, row) => cells.forEach((cell, column) => {
    cell.setAttribute("tabindex", row + column === 0 ? "0" : "-1");
    cell.addEventListener("mouseenter", () => tell(row, column));
    cell.addEventListener("focus", () => tell(row, column));
    cell.addEventListener("keydown", (event) => {
      const step = steps[event.key];
      if (!step) return;
      event.preventDefault();
      focus(row + step[0], column + step[1]);
    });
  }));
  for (const choice of section.querySelectorAll(".switch input")) {
    choice.addEventListener("change", () => show(Number(choice.value)));
  }
}

// Long tables: show the rows that contain a text.
for (const section of document.querySelectorAll("section.table")) {
  const search = section.querySelector("input[type=search]");
  if (!search) continue;
  const rows = [...section.querySelectorAll("tbody tr")];
  search.addEventListener("input", () => {
    const wanted = search.value.toLowerCase();
    for (const row of rows) row.hidden = !row.textContent.toLowerCase().includes(wanted);
    section.querySelector(".count").textContent = `${rows.filter((row) => !row.hidden).length} of ${rows.length} rows`;
  });
}

// The report as Markdown, for an issue.
document.getElementById("copy").addEventListener("click", async () => {
  const text = document.getElementById("markdown");
  const copied = document.getElementById("copied");
  try {
    await navigator.clipboard.writeText(text.value);
    copied.textContent = "copied";
  } catch {
    // Without the right to the clipboard, the text is shown to be copied by hand.
    text.hidden = false;
    text.select();
    copied.textContent = "press Ctrl+C to copy";
  }
});
