/** Names of files: their parts, which are the same, and which fit what a person types. */

const ENDING = ".safetensors";

/** Both systems' separators mean the same. @param {string} name */
export function sameSeparators(name) {
  return name.replaceAll("\\", "/");
}

/**
 * The parts that are shown: the folder with its separator, and the name without the usual ending.
 *
 * @param {string} name
 * @returns {{folder: string, base: string}}
 */
export function parts(name) {
  const path = sameSeparators(name);
  const cut = path.lastIndexOf("/") + 1;
  const base = path.slice(cut);
  const short = base.toLowerCase().endsWith(ENDING) ? base.slice(0, -ENDING.length) : base;
  return { folder: path.slice(0, cut), base: short || base };
}

/** The list of files that the server offers. */
export class Names {
  /** @param {string[]} names */
  constructor(names) {
    this.all = names;
    this._paths = new Set(names.map(sameSeparators));
    this._lower = null;
  }

  /** @param {string} name */
  has(name) {
    return this._paths.has(sameSeparators(name));
  }

  /**
   * The names that have every word of a query in them, the best first.
   *
   * @param {string} query
   * @returns {string[]}
   */
  find(query) {
    const words = sameSeparators(query).toLowerCase().split(/\s+/).filter(Boolean);
    if (words.length === 0) return this.all;
    this._lower ??= this.all.map((name) => sameSeparators(name).toLowerCase());
    const found = [];
    this._lower.forEach((path, index) => {
      const score = scoreOf(path, words);
      if (score !== null) found.push({ score, length: path.length, index });
    });
    found.sort((a, b) => b.score - a.score || a.length - b.length || a.index - b.index);
    return found.map(({ index }) => this.all[index]);
  }
}

/**
 * How well a path fits: words at the beginning of the file's name count most, then at the beginning
 * of a part of it, then anywhere in it, then in the folder.
 *
 * @param {string} path
 * @param {string[]} words
 * @returns {number | null} null where a word is missing.
 */
function scoreOf(path, words) {
  const base = path.slice(path.lastIndexOf("/") + 1);
  let score = 0;
  for (const word of words) {
    const at = base.indexOf(word);
    if (at === 0) score += 8;
    else if (startsPart(base, word)) score += 6;
    else if (at > 0) score += 4;
    else if (startsPart(path, word)) score += 2;
    else if (path.includes(word)) score += 1;
    else return null;
  }
  return score;
}

/** @param {string} text @param {string} word */
function startsPart(text, word) {
  for (let at = text.indexOf(word); at >= 0; at = text.indexOf(word, at + 1)) {
    if (at === 0 || /[^\p{L}\p{N}]/u.test(text[at - 1])) return true;
  }
  return false;
}
