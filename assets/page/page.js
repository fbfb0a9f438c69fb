// Runs before Gradio, which asks the browser for its language and the address for the look once, at its start.
// The conversations live in this browser alone, each under its own key: tabs do not overwrite one another's.
"use strict";
const talks = (() => {
  const PREFIX = "namesake talk ", memory = new Map();
  const store = (() => {
    try {
      localStorage.setItem("namesake", "");
      return localStorage;
    } catch {  // a browser may forbid it in another site's frame: then they last as long as the page
      return {
        getItem: (key) => memory.get(key) ?? null, setItem: (key, value) => void memory.set(key, value),
        removeItem: (key) => void memory.delete(key), key: (i) => [...memory.keys()][i],
        get length() { return memory.size; },
      };
    }
  })();
  const tab = store === localStorage ? sessionStorage : store;

  const address = new URLSearchParams(location.search);
  for (const key of ["lang", "__theme"]) {
    if (address.has(key)) store.setItem("namesake " + key, address.get(key));
    else if (store.getItem("namesake " + key)) address.set(key, store.getItem("namesake " + key));
  }
  if (String(address)) history.replaceState(null, "", "?" + address);
  let language = address.get("lang") || navigator.language;
  if (/^zh/i.test(language)) language = /^zh-(tw|hk|mo|hant)/i.test(language) ? "zh-TW" : "zh-CN";
  Object.defineProperty(navigator, "language", { get: () => language });
  document.documentElement.lang = language;
  const say = (english) => (language.startsWith("zh") && CHINESE[english]) || english;

  // Text of a model may link to http and https alone.
  for (const event of ["click", "auxclick"]) {
    addEventListener(event, (e) => {
      const link = e.target.closest?.(".message a");
      if (link && !/^https?:$/.test(link.protocol)) e.preventDefault();
    }, true);
  }

  // What Gradio leaves undone for those who hear the page or have no mouse.
  new MutationObserver(() => {
    for (const list of document.querySelectorAll(".examples[role=list]")) list.removeAttribute("role");
    for (const said of document.querySelectorAll(".message [data-testid][aria-label]:not([role])")) said.role = "group";
    for (const wide of document.querySelectorAll(".message :is(pre, table, .katex-display):not([tabindex])")) wide.tabIndex = 0;
  }).observe(document, { childList: true, subtree: true });

  const update = (properties) => ({ __type__: "update", ...properties });
  const keep = update({});
  const read = (id) => JSON.parse(store.getItem(PREFIX + id));
  const write = (id, talk) => store.setItem(PREFIX + id, JSON.stringify({ ...talk, changed: Date.now() }));
  const plain = (content) =>
    (typeof content === "string" ? content : content.map((part) => part.text ?? "").join(""))
      .replace(/([<&$])\u2060|\u2060(?=\$)/g, "$1");
  const PICTURE = /^<img alt="" src="(data:image\/[\w.+-]+;base64,[A-Za-z0-9+/=]+)">$/;
  // In OpenAI's form; a picture comes from the chat as HTML, or as it was kept.
  const kept = (content) => {
    const urls = typeof content === "string" ? []
      : content.map((part) => PICTURE.exec(part.value ?? "")?.[1] ?? part.image_url?.url).filter(Boolean);
    if (!urls.length) return plain(content);
    return [...urls.map((url) => ({ type: "image_url", image_url: { url } })), { type: "text", text: plain(content) }];
  };
  const line = (text) => text.replace(/\s+/g, " ").trim().slice(0, 80);

  function found(search = "") {
    const words = search.toLowerCase();
    return Array.from({ length: store.length }, (_, i) => store.key(i))
      .filter((key) => key.startsWith(PREFIX))
      .map((key) => ({ id: key.slice(PREFIX.length), ...JSON.parse(store.getItem(key)) }))
      .filter((talk) => (talk.title + "\n" + talk.messages.map((m) => plain(m.content)).join("\n")).toLowerCase().includes(words))
      .sort((a, b) => b.changed - a.changed);
  }
  const list = (search, id = tab.getItem("namesake open")) =>
    update({ choices: found(search).map((talk) => [talk.title, talk.id]), value: id || null });

  function save(history, system, id, search) {
    if (!id || !history?.length) return [];
    const messages = history.map((m) => ({ role: m.role, content: kept(m.content) }));
    if (system?.trim()) messages.unshift({ role: "system", content: system });
    const before = read(id);
    tab.setItem("namesake open", id);
    if (JSON.stringify(before?.messages) === JSON.stringify(messages)) return [];
    const title = before?.title ?? (line(plain(messages.find((m) => m.role === "user")?.content ?? "")) || say("A picture"));
    try {
      write(id, { title, messages });
    } catch {
      return [keep, keep, say("This browser's storage is full: export some conversations and delete them.")];
    }
    return before ? [keep, keep, ""] : [list(search, id), title, ""];  // a title that is being typed stays
  }

  const open = (id) => {
    tab.setItem("namesake open", id ?? "");
    return JSON.stringify({ id: id ?? "", ...read(id) });
  };

  const start = () => [open(tab.getItem("namesake open") || ""), tab.getItem("namesake draft") || ""];

  const draft = (text) => (tab.setItem("namesake draft", text ?? ""), []);

  function rename(id, title, search) {
    const talk = id && read(id);
    if (!talk || !line(title)) return [];
    store.setItem(PREFIX + id, JSON.stringify({ ...talk, title: line(title) }));
    return [list(search, id)];
  }

  function remove(id, search) {
    store.removeItem(PREFIX + id);
    tab.setItem("namesake open", "");
    return [list(search, null)];
  }

  const roles = "system|user|assistant";
  const toMarkdown = (talk) =>
    `# ${talk.title}\n` + talk.messages.map((m) =>
      `\n## ${m.role}\n\n${plain(m.content).replace(RegExp(`^(\\\\*## (?:${roles}))$`, "gm"), "\\$1")}\n`).join("");
  const fromMarkdown = (text) => {
    const [, title] = /^# (.*)\n/.exec(text) ?? [];
    const parts = text.replace(/^# .*\n/, "\n").split(RegExp(`\\n## (${roles})\\n\\n`));
    const messages = [];
    for (let i = 1; i < parts.length; i += 2) {
      const content = parts[i + 1].replace(/\n$/, "").replace(RegExp(`^\\\\(\\\\*## (?:${roles}))$`, "gm"), "$1");
      messages.push({ role: parts[i], content });
    }
    return { title, messages };
  };

  // The open conversation, or where none is open all that are listed.
  function save_as(id, search, markdown) {
    const chosen = (id && read(id) ? [read(id)] : found(search)).map(({ title, messages }) => ({ title, messages }));
    if (!chosen.length) return [say("There is no conversation to export yet.")];
    const text = markdown ? chosen.map(toMarkdown).join("\n") : chosen.map((talk) => JSON.stringify(talk) + "\n").join("");
    const name = (chosen.length > 1 ? "conversations" : chosen[0].title).replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 60);
    const extension = markdown ? "md" : chosen.length > 1 ? "jsonl" : "json";
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type: "text/plain" }));
    link.download = `${name || "conversation"}.${extension}`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60000);
    return [""];
  }

  function parse(text) {
    if (/^# .*\n\s*## /.test(text)) return text.split(RegExp(`\\n(?=# .*\\n\\n## (?:${roles})\\n)`)).map(fromMarkdown);
    let values;
    try {
      values = [JSON.parse(text)].flat();
    } catch {
      values = text.split("\n").filter((row) => row.trim()).map((row) => JSON.parse(row));
    }
    return values[0]?.role ? [{ messages: values }] : values;
  }

  function checked(talk) {
    const messages = talk.messages.map(({ role, content }) => ({ role, content: kept(content) }));
    const sent = messages.every((m) => typeof m.content === "string" || m.content.every((part) => !part.image_url || /^data:image\//.test(part.image_url.url)));
    const good = sent && messages.length && messages.every((m, i) => RegExp(`^(${i ? "" : "system|"}user|assistant)$`).test(m.role));
    if (!good) throw Error();
    return { title: line(talk.title ?? (plain(messages.find((m) => m.role === "user")?.content ?? "") || "?")), messages };
  }

  const load = (search) => new Promise((done) => {
    const input = document.createElement("input");
    Object.assign(input, { type: "file", accept: ".json,.jsonl,.md,.txt" });
    input.oncancel = () => done([]);
    input.onchange = async () => {
      const file = input.files[0];
      try {
        const read = parse(await file.text()).map(checked);
        for (const talk of read) write(Date.now().toString(36) + Math.random().toString(36).slice(2), talk);
        done([list(search), say("Imported conversations: {}").replace("{}", read.length)]);
      } catch (error) {
        const full = error.name === "QuotaExceededError";
        done([keep, say(full ? "This browser's storage is full: export some conversations and delete them."
          : "{} holds no conversation: give JSON with OpenAI's messages, or Markdown that was exported here.")
          .replace("{}", file.name.replace(/[<&]/g, ""))]);
      }
    };
    input.click();
  });

  // Pictures: chosen, taken with a phone's camera, pasted or dropped. They are made small here, turned as their EXIF says.
  const SIDE = 672;
  let given = [];
  const choose = () => new Promise((done) => {
    const input = Object.assign(document.createElement("input"), { type: "file", accept: "image/*", multiple: true });
    input.oncancel = () => done([]);
    input.onchange = () => done([...input.files]);
    input.click();
  });
  async function small(file) {
    const picture = await createImageBitmap(file);
    const scale = Math.min(1, SIDE / Math.max(picture.width, picture.height));
    const [width, height] = [picture.width, picture.height].map((side) => Math.max(1, Math.round(side * scale)));
    const canvas = Object.assign(document.createElement("canvas"), { width, height });
    const pen = canvas.getContext("2d");
    pen.fillStyle = "white";  // behind what is transparent
    pen.fillRect(0, 0, width, height);
    pen.drawImage(picture, 0, 0, width, height);
    return canvas.toDataURL("image/jpeg", 0.92);
  }
  async function add(urls) {
    const found = JSON.parse(urls);
    for (const file of given.length ? given.splice(0) : await choose()) {
      try {
        found.push(await small(file));
      } catch {
        return [keep, say("{} is no picture that this browser can read.").replace("{}", file.name.replace(/[<&]/g, ""))];
      }
    }
    return [JSON.stringify(found), keep];
  }
  const chosen = (urls) => {
    const found = JSON.parse(urls);
    return [found.map((url) => `<img alt="" src="${url}">`).join(""), update({ visible: found.length > 0 })];
  };
  const receive = (data, event) => {
    const button = document.querySelector("#add");
    const files = [...(data?.files ?? [])].filter((file) => file.type.startsWith("image/"));
    if (!button || !files.length) return;
    event.preventDefault();
    event.stopPropagation();
    given = files;
    button.click();
  };
  addEventListener("paste", (event) => receive(event.clipboardData, event), true);
  addEventListener("dragover", (event) => document.querySelector("#add") && event.preventDefault());
  addEventListener("drop", (event) => receive(event.dataTransfer, event), true);

  // What opens below the window's edge is not seen to open.
  const reveal = () => (setTimeout(() => document.querySelector("#settings").scrollIntoView({ block: "end" }), 100), []);

  const wide = () => update({ open: innerWidth > 1000 });

  return { list, save, open, start, draft, rename, remove, save_as, load, add, chosen, reveal, wide };
})();
