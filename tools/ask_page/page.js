"use strict";
(() => {
  const at = (id) => document.getElementById(id);
  const question = at("question"), form = at("form"), files = at("files"), next = at("images");
  let turns = [];      // as the server takes them
  let pictures = [];   // of the next question: {content: base64 of a file, name, url}
  let reading = 0;     // files that are being read
  let answering = null; // the AbortController of the answer that is awaited

  const update = () => {
    at("send").disabled = answering !== null || reading > 0 || !question.value.trim();
    at("stop").hidden = answering === null;
  };

  const say = (text) => {
    at("error").textContent = text;
    at("error").hidden = !text;
  };

  const element = (tag, className, text = "") => {
    const made = document.createElement(tag);
    made.className = className;
    made.textContent = text;
    return made;
  };

  const shown = (picture) => {
    const box = element("div", "picture"), image = document.createElement("img");
    image.alt = picture.name;
    image.src = picture.url;
    image.onerror = () => image.replaceWith(element("span", "name", picture.name)); // such as TIFF
    box.append(image);
    return box;
  };

  const showPictures = () => {
    next.replaceChildren(...pictures.map((picture, i) => {
      const box = shown(picture), remove = element("button", "", "×");
      remove.type = "button";
      remove.setAttribute("aria-label", "Remove " + picture.name);
      remove.onclick = () => {
        URL.revokeObjectURL(pictures.splice(i, 1)[0].url);
        showPictures();
        question.focus();
      };
      box.append(remove);
      return box;
    }));
    update();
  };

  const base64 = (file) => new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result.slice(reader.result.indexOf(",") + 1));
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });

  const add = async (list) => {
    say("");
    const chosen = [...list];
    reading += 1;
    update();
    try {
      const contents = await Promise.all(chosen.map(base64));
      chosen.forEach((file, i) => {
        pictures.push({content: contents[i], name: file.name || "picture", url: URL.createObjectURL(file)});
      });
    } catch (e) {
      say("A file could not be read: " + e.message);
    }
    reading -= 1;
    showPictures();
    question.focus();
  };

  const receive = async (response, onLine) => {
    if (!response.ok) {
      const told = await response.json().catch(() => ({}));
      throw new Error(told.error || "the server answered with status " + response.status);
    }
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (let part = await reader.read(); !part.done; part = await reader.read()) {
      const lines = (rest + part.value).split("\n");
      rest = lines.pop();
      lines.forEach((line) => onLine(JSON.parse(line)));
    }
  };

  const ask = async () => {
    if (at("send").disabled) return;
    say("");
    const turn = {images: pictures.map((p) => p.content), user: question.value.trim(), assistant: ""};
    const asked = element("div", "user"), answer = element("div", "assistant");
    if (pictures.length) {
      const row = element("div", "images");
      row.append(...pictures.map(shown));
      asked.append(row);
    }
    asked.append(turn.user);
    answer.setAttribute("aria-busy", "true");
    at("turns").append(asked, answer);
    const sent = pictures, controller = answering = new AbortController();
    pictures = [];
    question.value = "";
    showPictures();
    answer.scrollIntoView({block: "nearest"});
    let problem = "", done = false;
    try {
      const body = JSON.stringify({turns: [...turns, turn]});
      const headers = {"Content-Type": "application/json"};
      const response = await fetch("ask", {method: "POST", headers, body, signal: controller.signal});
      await receive(response, (line) => {
        if (line.text) answer.textContent += line.text;
        if (line.error) problem = line.error;
        if ("answer" in line) {
          turn.assistant = line.answer;
          done = true;
        }
      });
      if (!done && !problem) problem = "the server ended before the answer did";
    } catch (e) {
      problem = e.name === "AbortError" ? "" : e.message;
    }
    if (answering !== controller) return; // a new conversation has begun
    answering = null;
    answer.removeAttribute("aria-busy");
    if (problem) { // the question stays, to be asked again
      say(problem);
      asked.remove();
      answer.remove();
      pictures = [...sent, ...pictures];
      question.value ||= turn.user;
    } else {
      turn.assistant = done ? turn.assistant : answer.textContent; // after Stop, what was seen
      if (!answer.textContent.trim()) answer.append(element("i", "dim", done ? "The answer is empty." : "Stopped."));
      turns.push(turn);
    }
    showPictures();
    question.focus();
  };

  form.onsubmit = (event) => { event.preventDefault(); ask(); };
  question.oninput = update;
  question.onkeydown = (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); ask(); }
  };
  at("stop").onclick = () => answering && answering.abort();
  at("choose").onclick = () => files.click();
  files.onchange = async () => { await add(files.files); files.value = ""; };
  at("new").onclick = () => {
    const running = answering;
    answering = null;
    if (running) running.abort();
    turns = [];
    pictures = [];
    at("turns").replaceChildren();
    say("");
    showPictures();
    question.focus();
  };
  document.addEventListener("dragover", (event) => { event.preventDefault(); document.body.classList.add("dropping"); });
  document.addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) document.body.classList.remove("dropping");
  });
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    document.body.classList.remove("dropping");
    if (event.dataTransfer.files.length) add(event.dataTransfer.files);
  });
  document.addEventListener("paste", (event) => {
    if (event.clipboardData.files.length) { event.preventDefault(); add(event.clipboardData.files); }
  });
  fetch("about").then((response) => response.json()).then((about) => {
    at("about").textContent = about.model + ", up to " + about.num_crops + " crops a picture and " +
      about.max_new_tokens + " tokens an answer";
  }).catch(() => say("the server does not answer"));
  update();
  question.focus();
})();
