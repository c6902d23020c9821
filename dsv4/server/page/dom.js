// The one way in which this page makes elements. Strings become text and never markup.

export const by = (id) => document.getElementById(id);

export function node(name, properties, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}
