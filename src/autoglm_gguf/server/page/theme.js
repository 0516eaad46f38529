// Light or dark, before the first paint: a classic script, since modules run after it.
(() => {
  const system = matchMedia("(prefers-color-scheme: dark)");
  function kept() {
    try {
      return localStorage.getItem("autoglm.theme");
    } catch {
      return null;
    }
  }
  function show() {
    const theme = kept() ?? (system.matches ? "dark" : "light");
    document.documentElement.dataset.theme = theme;
  }
  show();
  system.addEventListener("change", show);
})();
