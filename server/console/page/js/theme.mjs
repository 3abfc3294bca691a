/** Light or dark: the system's until the reader chooses; the choice stays in this browser. */

const CHOICE = "perft-theme";
const system = matchMedia("(prefers-color-scheme: dark)");

function chosen() {
  try {
    return localStorage.getItem(CHOICE);
  } catch {
    return null;
  }
}

function apply(button) {
  const theme = chosen() ?? (system.matches ? "dark" : "light");
  document.documentElement.dataset.theme = theme;
  button.textContent = theme === "dark" ? "\u2600" : "\u263e";
  button.setAttribute("aria-label", theme === "dark" ? "Use light colours" : "Use dark colours");
}

/** Show the theme, and let the button change it. */
export function startTheme(button) {
  apply(button);
  system.addEventListener("change", () => apply(button));
  button.addEventListener("click", () => {
    const next = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
    try {
      localStorage.setItem(CHOICE, next);
    } catch {
      // it holds for this page only
    }
    apply(button);
  });
}
