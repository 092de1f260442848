// Before the first paint: the theme that was chosen, or the system's.
try {
  const theme = localStorage.getItem('rivulet:theme');
  if (theme === 'light' || theme === 'dark') document.documentElement.dataset.theme = theme;
} catch {
  // Storage is off: the system's theme it is.
}
