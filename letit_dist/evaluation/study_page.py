"""The page of a human study: one file that shows, asks, remembers and hands out its votes, and knows no method."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from string import Template

from letit_dist.evaluation.web_page import page

_STYLE = Template("""
:root { color-scheme: light; font: 1.05rem/1.5 system-ui, sans-serif; color: #161616; background: #fff; }
body { margin: 0 auto; padding: 1rem; max-width: 80rem; }
h1 { font-size: 1.3rem; margin: 0 0 .5rem; }
#question { font-size: 1.15rem; min-height: 3.2rem; margin: 1rem 0 .5rem; }
#pictures { display: flex; flex-wrap: wrap; gap: 1rem; align-items: flex-start; }
figure { margin: 0; }
figcaption { font-size: .95rem; }
img { display: block; width: $side; height: auto; max-width: 88vw; }
#choices { display: flex; flex-wrap: wrap; gap: 1rem; }
#choices button { padding: .4rem; border: 3px solid #bbb; background: #fff; cursor: pointer; }
#choices button[aria-pressed=true] { border-color: #0072b2; background: #e3f0f8; }
button, input { font: inherit; color: inherit; }
button, input { min-height: 2.75rem; padding: .3rem 1rem; box-sizing: border-box; }
progress { width: 100%; height: 1rem; accent-color: #0072b2; }
:focus-visible { outline: 3px solid #e69f00; outline-offset: 2px; }
[hidden] { display: none !important; }
""")

_BODY = Template("""
<noscript><p>This page needs scripts: they show the pictures and keep your votes, here in your browser.</p></noscript>
<form id="start">
<p>$introduction</p>
<p><label for="rater">Your name, or any word that nobody else uses:</label>
<input id="rater" autocomplete="off" required maxlength="60"> <button>Begin</button></p>
</form>
<main id="work" hidden>
<progress id="progress" aria-label="Progress"></progress>
<p id="place" role="status"></p>
<p id="question"></p>
<div id="pictures">
<figure id="source"><figcaption>before</figcaption><img alt="the picture before"></figure>
<div id="choices" role="group" aria-labelledby="question"></div>
</div>
<p>Press the number of a picture, or click on it. <button id="back" type="button">Back (Backspace)</button></p>
</main>
<section id="end" hidden><p>Done, thank you. Please save your votes and send the file back.</p></section>
<p id="tools" hidden><button id="save" type="button">Save votes as a file</button></p>
<p id="warning" role="alert" hidden></p>
<script id="study" type="application/json">$data</script>
""")

# Votes leave the page as a file that the rater sends.
_SCRIPT = """
"use strict";
const study = JSON.parse(document.getElementById("study").textContent);
const at = id => document.getElementById(id);
const steps = study.questions.flatMap(question => study.trials.map((_, trial) => ({question, trial})));
const nameOf = step => step.question.name + ":" + step.trial;
const place = "letit-study-" + study.id;
let state = {rater: "", votes: {}}, current = 0, shownAt = 0;

const warn = text => { at("warning").textContent = text; at("warning").hidden = !text; };
const keep = () => {
  try { localStorage.setItem(place, JSON.stringify(state)); }
  catch (error) { warn("This browser keeps nothing for a file: save your votes before you close the page."); }
};
const recall = () => {
  try {
    const kept = JSON.parse(localStorage.getItem(place));
    if (kept && typeof kept.rater === "string" && kept.votes) state = kept;
  } catch (error) { warn("What this browser kept cannot be read: votes begin anew."); }
};
const firstOpen = () => {
  const found = steps.findIndex(step => !(nameOf(step) in state.votes));
  return found < 0 ? steps.length : found;
};
const show = () => {
  const done = Object.keys(state.votes).length, over = current >= steps.length;
  at("start").hidden = Boolean(state.rater);
  at("work").hidden = !state.rater || over;
  at("end").hidden = !state.rater || !over;
  at("tools").hidden = !done;
  at("progress").max = steps.length;
  at("progress").value = done;
  if (!state.rater || over) return;
  const {question, trial} = steps[current], vote = state.votes[nameOf(steps[current])];
  at("place").textContent = current + 1 + " of " + steps.length;
  at("question").textContent = question.text;
  at("source").hidden = !question.source;
  at("source").querySelector("img").src = study.trials[trial].source;
  at("choices").replaceChildren(...study.trials[trial].pictures.map((picture, position) => {
    const button = document.createElement("button"), image = document.createElement("img");
    image.src = picture;
    image.alt = "";
    button.type = "button";
    button.setAttribute("aria-pressed", Boolean(vote && vote.position === position));
    button.setAttribute("aria-label", "Picture " + (position + 1));
    button.append(image, String(position + 1));
    button.addEventListener("click", () => choose(position));
    return button;
  }));
  shownAt = performance.now();
};
const choose = position => {
  const seconds = Math.round((performance.now() - shownAt) / 100) / 10;
  state.votes[nameOf(steps[current])] = {position, seconds};
  keep();
  current += 1;
  show();
};
const goBack = () => { if (current > 0) { current -= 1; show(); } };
const csv = () => {
  const quote = text => '"' + String(text).replaceAll('"', '""') + '"';
  const rows = steps.filter(step => nameOf(step) in state.votes).map(step => {
    const vote = state.votes[nameOf(step)];
    return [study.id, quote(state.rater), step.question.name, step.trial, vote.position, vote.seconds].join(",");
  });
  return ["study,rater,question,trial,position,seconds", ...rows].join("\\r\\n") + "\\r\\n";
};
const save = () => {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([csv()], {type: "text/csv"}));
  link.download = ["votes", study.id, state.rater.replace(/[^\\w-]+/g, "_")].join("-") + ".csv";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
};
at("start").addEventListener("submit", event => {
  event.preventDefault();
  state.rater = at("rater").value.trim();
  if (!state.rater) return;
  keep();
  show();
});
at("back").addEventListener("click", goBack);
at("save").addEventListener("click", save);
document.addEventListener("keydown", event => {
  const busy = event.repeat || event.ctrlKey || event.altKey || event.metaKey || at("start").contains(event.target);
  if (busy || !state.rater) return;
  if (event.key === "Backspace" || event.key === "ArrowLeft") { event.preventDefault(); goBack(); return; }
  const position = Number(event.key) - 1;
  if (current < steps.length && position in study.trials[steps[current].trial].pictures) choose(position);
});
recall();
current = firstOpen();
show();
"""


def study_page(
    title: str,
    identity: str,
    questions: Sequence[Mapping[str, object]],
    trials: Sequence[Mapping[str, object]],
    *,
    introduction: str,
    side: int,
) -> str:
    """HTML with `questions` (name, text, and whether the source is shown) about each of `trials` (source and pictures
    as data URIs, `side` pixels wide). All of one question come before the next one."""
    data = json.dumps({"id": identity, "questions": list(questions), "trials": list(trials)})
    body = _BODY.substitute(
        introduction=escape(introduction),
        data=data.replace("<", "\\u003c"),  # or text could end the script element
    )
    return page(title, _STYLE.substitute(side=f"{side}px"), body, _SCRIPT)
