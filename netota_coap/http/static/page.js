// Updates the open page, which without JavaScript stays as it was loaded. Numbers arrive as events.
// When anything else changes, the page is fetched again: only the server's templates make pages.
"use strict";

const ages = [[31557600, "year"], [2629800, "month"], [86400, "day"], [3600, "hour"], [60, "minute"]];

function age(seconds) {
  for (const [size, unit] of ages) {
    const count = Math.floor(seconds / size);
    if (count >= 1) return `${count} ${unit}${count > 1 ? "s" : ""} ago`;
  }
  return "just now";
}

function showAges() {
  for (const time of document.querySelectorAll("time")) {
    time.textContent = age((Date.now() - Date.parse(time.dateTime)) / 1000);
  }
}

function showCount(name, count) {
  const text = count.toLocaleString("en");
  for (const element of document.querySelectorAll("main [data-live], header [data-live]")) {
    if (element.dataset.live !== name || element.textContent === text) continue;
    element.textContent = text;
    flash(element);
  }
}

function flash(element) {
  element.classList.remove("fresh");
  void element.offsetWidth; // a reflow, without which the animation does not start again
  element.classList.add("fresh");
}

const versions = () => new Map([...document.querySelectorAll("main .version")].map(
  (element, index) => [element.closest("[id]").id || index, element]));

let wanted = "";
let fetching = false;

async function refresh() {
  if (fetching) return;
  fetching = true;
  try {
    while (wanted !== document.getElementById("main").dataset.mark) {
      const asked = wanted;
      const answer = await fetch(location.href, {headers: {Accept: "text/html"}});
      if (!answer.ok && answer.status !== 404) throw new Error(answer.statusText);
      show(new DOMParser().parseFromString(await answer.text(), "text/html"));
      if (asked === wanted) break;
    }
  } catch {
    setTimeout(refresh, 2000);
  } finally {
    fetching = false;
  }
}

function show(fresh) {
  const old = document.getElementById("main");
  const open = new Map([...old.querySelectorAll("details")].map(d => [d.id, d.open]));
  const focused = document.activeElement;
  const place = focused && old.contains(focused) && focused !== old
    ? [...old.querySelectorAll("a, button, summary, [tabindex]")].indexOf(focused) : -1;
  const before = new Map([...versions()].map(([id, element]) => [id, element.textContent]));
  const main = document.adoptNode(fresh.getElementById("main"));
  for (const details of main.querySelectorAll("details")) {
    if (open.has(details.id)) details.open = open.get(details.id);
  }
  old.replaceWith(main);
  document.title = fresh.title;
  if (place >= 0) {
    (main.querySelectorAll("a, button, summary, [tabindex]")[place] || main).focus({preventScroll: true});
  }
  for (const [id, element] of versions()) {
    if (before.size && before.get(id) !== element.textContent) flash(element);
  }
  showAges();
  document.getElementById("news").textContent = `${document.title}: the page was updated`;
}

function follow() {
  const state = document.querySelector(".live");
  const source = new EventSource(document.body.dataset.live);
  source.onopen = () => { state.textContent = "live"; state.className = "live on"; };
  source.onerror = () => { state.textContent = "not connected"; state.className = "live off"; };
  source.addEventListener("live", event => {
    const {page, ...counts} = JSON.parse(event.data);
    for (const [name, count] of Object.entries(counts)) showCount(name, count);
    if (page) {
      wanted = page;
      refresh();
    }
  });
}

async function copy(button) {
  try {
    await navigator.clipboard.writeText(button.dataset.copy);
  } catch { // browsers offer the clipboard only over HTTPS and on localhost
    const code = button.parentElement.querySelector("code");
    getSelection().selectAllChildren(code);
    document.execCommand("copy");
  }
  button.textContent = "Copied";
  setTimeout(() => { button.textContent = "Copy"; }, 1500);
}

document.documentElement.classList.add("scripted");
document.addEventListener("click", event => {
  const button = event.target.closest("button.copy");
  if (button) copy(button);
});
setInterval(showAges, 30000);
follow();
