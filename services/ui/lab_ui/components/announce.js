// Lets screen readers read one sentence at the end of an answer: Streamlit's chat has no live region.
export default function (component) {
  const { data, parentElement } = component;
  const region = parentElement.querySelector("[aria-live]");
  if (region.textContent !== data.text) region.textContent = data.text;
}
