() => {
  const find = (selector, root = document) => root.querySelector(selector);
  // Screen readers hear this element, which stays; it says what the newest result is.
  const said = Object.assign(document.createElement("div"), { id: "said" });
  said.setAttribute("role", "status");
  document.body.append(said);
  let mapsOpen = false;

  const address = (change) => {
    const query = new URLSearchParams(location.search);
    for (const [key, value] of Object.entries(change)) value ? query.set(key, value) : query.delete(key);
    if (`?${query}` !== location.search) history.pushState(null, "", `?${query}`);
  };
  const until = async (selector, meanwhile) => {
    for (let tries = 0; !find(selector) && tries < 200; tries++) {
      meanwhile?.();
      await new Promise((done) => setTimeout(done, 50));
    }
    return find(selector);
  };
  const follow = async () => {
    const query = new URLSearchParams(location.search), example = query.get("example");
    const tab = `#tab-${CSS.escape(query.get("tab") || "one")}-button`;
    await until(`${tab}[aria-selected="true"]`, () => find(tab)?.click()); // a click before Gradio listens is lost
    if (example) (await until(`[data-click="${CSS.escape(example)}"]`))?.click();
  };
  const press = (box, button) => {
    for (const one of box.querySelectorAll("[aria-pressed]")) one.setAttribute("aria-pressed", one === button);
  };
  const choose = (link) => {
    const card = find(link.getAttribute("href"));
    if (card) find(".chosen", link.closest(".beside")).innerHTML = card.outerHTML.replace(/ id="[^"]*"/, "");
  };

  document.addEventListener("click", async (event) => {
    const at = (selector) => event.target.closest(selector);
    const example = at("[data-click][aria-pressed]"), tab = at("button[id^=tab-][role=tab]");
    if (example) {
      press(example.closest(".examples"), example);
      find(example.closest(".cells") ? "#one-result" : "#field-result").classList.add("busy");
      address({ tab: example.closest(".cells") ? "one" : "field", example: example.dataset.click });
    }
    if (tab && event.isTrusted) address({ tab: tab.id.slice(4, -7), example: null });
    if (at("[data-cell]")) { event.preventDefault(); choose(at("[data-cell]")); }
    if (at(".maps summary")) mapsOpen = !at(".maps").open;
    if (at("[data-copy]")) {
      await navigator.clipboard.writeText(at("[data-copy]").dataset.copy);
      at("[data-copy]").textContent = "Copied";
    }
  });
  for (const kind of ["pointerover", "focusin"]) {
    document.addEventListener(kind, (event) => { const cell = event.target.closest?.("[data-cell]"); if (cell) choose(cell); });
  }
  document.addEventListener("input", ({ target }) => {
    const section = target.closest(".reading");
    if ("zoom" in target.dataset) for (const svg of section.querySelectorAll("svg")) svg.style.width = `${100 * target.value}%`;
    for (const cell of section?.querySelectorAll(`[data-cell="${target.dataset.toggle}"]`) || []) {
      cell.style.display = target.checked ? "" : "none";
    }
  });
  // Gradio's file boxes take drops and choices; a pasted image is handed to the visible one here.
  document.addEventListener("change", (event) => {
    const box = event.target.closest(".upload");
    if (!box || event.target.type !== "file") return;
    for (const examples of document.querySelectorAll(".examples")) if (examples.checkVisibility()) press(examples);
    address({ example: null });
    if (box.id === "one-upload" && event.target.files.length === 1) find("#one-result").classList.add("busy");
  });
  document.addEventListener("paste", ({ clipboardData }) => {
    const box = [...document.querySelectorAll(".upload")].find((one) => one.checkVisibility());
    const input = box && find("input[type=file]", box);
    if (!input || !clipboardData?.files.length) return;
    input.files = clipboardData.files;
    input.dispatchEvent(new Event("change", { bubbles: true }));
  });
  addEventListener("popstate", follow);

  // Gradio draws a tab when it is opened first, and an upload box anew when it is filled.
  new MutationObserver(() => {
    // Its name is what is written on it; filled, it is a button within a button that does nothing.
    for (const one of document.querySelectorAll(".upload-container[aria-label]:has(.wrap)")) one.removeAttribute("aria-label");
    for (const one of document.querySelectorAll("button:not([role]):has(.upload-container)")) {
      one.setAttribute("role", "group");
      one.tabIndex = -1;
    }
    for (const section of document.querySelectorAll("[id$=-result] > * .reading, [id$=-result] > .reading")) {
      const box = section.closest("[id$=-result]");
      if (box.shown === section.dataset.stamp) continue;
      box.classList.remove("busy");
      said.textContent = section.dataset.said ?? said.textContent;
      // An upload may open another tab than the one that was clicked last.
      const tab = find("button[id^=tab-][aria-selected=true]")?.id.slice(4, -7);
      const known = new URLSearchParams(location.search).get("tab") || "one";
      if (box.shown && tab && tab !== known) address({ tab, example: null });
      if (find(".maps", section)) find(".maps", section).open = mapsOpen;
      if (innerWidth < 900 && box.shown) box.scrollIntoView({ behavior: "smooth" });
      box.shown = section.dataset.stamp;
      // Gradio changes what is there rather than to replace it: what was chosen for the last result would stay.
      for (const toggle of section.querySelectorAll("[data-toggle]")) toggle.checked = true;
      if (find("[data-zoom]", section)) find("[data-zoom]", section).value = 1;
    }
  }).observe(document.body, { childList: true, subtree: true, attributes: true, attributeFilter: ["data-stamp"] });
  if (location.search) follow();
}
