// The page: a photograph in, both images and a slider out.  The work is done in worker.mjs, so nothing here stands still.
const at = (id) => document.getElementById(id);
const worker = new Worker(`worker.mjs${location.search}`, { type: "module" });
let photo;

function state(name, text) {
  document.body.dataset.state = name;
  at("status").textContent = text;
  at("progress").hidden = name !== "busy";
}

async function take(file) {
  if (!file || document.body.dataset.state === "busy") return;
  state("busy", `reading ${file.name}`);
  at("progress").removeAttribute("value");
  try {
    // Turned as its EXIF says; the pixels as they are.
    const bitmap = await createImageBitmap(file, { premultiplyAlpha: "none" });
    const before = at("before");
    [before.width, before.height] = [bitmap.width, bitmap.height];
    const context = before.getContext("2d", { willReadFrequently: true });
    context.drawImage(bitmap, 0, 0);
    photo = { name: file.name, image: context.getImageData(0, 0, before.width, before.height) };
    worker.postMessage(photo.image);
  } catch (error) {
    state("failed", `${file.name} is not an image that this browser reads (${error.message})`);
  }
}

function show({ image, seconds, ran }) {
  const after = at("after");
  [after.width, after.height] = [image.width, image.height];
  after.getContext("2d").putImageData(image, 0, 0);
  at("result").hidden = false;
  after.toBlob((blob) => {
    URL.revokeObjectURL(at("save").href);
    at("save").href = URL.createObjectURL(blob);
    at("save").download = `${photo.name.replace(/\.[^.]*$/, "")}-restored.png`;
    state("done", `${image.width}x${image.height} in ${seconds.toFixed(2)} s, ${ran}`);
  }, "image/png");
}

worker.onmessage = ({ data }) => {
  if (data.error) state("failed", data.error);
  else if (data.image) show(data);
  else {
    if (data.share !== undefined) at("progress").value = data.share;
    at("status").textContent = data.text;
  }
};
worker.onerror = (event) => state("failed", event.message ?? "the worker cannot be loaded; run npm ci first");

at("file").onchange = ({ target }) => take(target.files[0]);
at("slider").oninput = ({ target }) => document.querySelector("figure").style.setProperty("--cut", `${target.value}%`);
for (const kind of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    at("drop").classList.toggle("over", kind === "dragover");
    if (kind === "drop") take(event.dataTransfer.files[0]);
  });
}
