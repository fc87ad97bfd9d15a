/**
 * Errors of our nodes in the person's language, beside ComfyUI's own message, which is English.
 *
 * The words are those of `locales/<language>/main.json`, as the server hands them to the frontend.
 */

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

import { translated } from "./errors/translate.js";

const OURS = /^(QwenLora|NunchakuQwenImageLora|NunchakuZImageTurboLora)/;
const ENGLISH = "en";
const SHOWN_MS = 20000;

let locales;

/** What the server has of our words, by language; asked for once. */
async function ourLocales() {
  locales ??= (async () => {
    const all = await (await api.fetchApi("/i18n")).json();
    return Object.fromEntries(
      Object.entries(all).map(([language, words]) => [language, words.qwenlora]),
    );
  })();
  return locales;
}

/** The words in the language that is set, by its whole name or by its first part; or nothing. */
function chosen(words) {
  const locale = String(app.extensionManager?.setting?.get?.("Comfy.Locale") ?? ENGLISH);
  const language = words[locale] ? locale : locale.split("-")[0];
  return language === ENGLISH ? undefined : words[language];
}

api.addEventListener("execution_error", async ({ detail }) => {
  if (!OURS.test(detail?.node_type ?? "")) return;
  try {
    const words = await ourLocales();
    const target = chosen(words);
    const text = target && translated(detail.exception_message, words[ENGLISH], target);
    if (!text) return;
    const [summary, ...rest] = text.split("\n");
    app.extensionManager?.toast?.add?.({
      severity: "error",
      summary,
      detail: rest.join("\n"),
      life: SHOWN_MS,
    });
  } catch (error) {
    console.warn("qwenlora: an error could not be translated", error);
  }
});
