// The engine of the page: on WebGPU where there is one, else WebAssembly with as many threads as there are cores.
// Images larger than a tile are restored in tiles whose margin is the network's view, so no seam can be seen:
// the result is the whole image's.  ?on=wasm leaves WebGPU out, ?tile=256 makes the tiles smaller.
const wanted = new URLSearchParams(location.search);
const dist = new URL("node_modules/onnxruntime-web/dist/", import.meta.url).href;
let loading;

async function load() {
  const adapter = wanted.get("on") === "wasm" ? null : await navigator.gpu?.requestAdapter().catch(() => null);
  if (adapter) {
    const half = adapter.features.has("shader-f16");
    try {
      return await open("ort.webgpu.min.mjs", half ? "fp16" : "fp32", "webgpu", "WebGPU");
    } catch (error) {
      console.info(`WebGPU is not used: ${error.message}`);
    }
  }
  const threads = self.crossOriginIsolated ? navigator.hardwareConcurrency : 1;
  return open("ort.wasm.min.mjs", "int8", "wasm", `WebAssembly, ${threads} thread${threads > 1 ? "s" : ""}`, threads);
}

async function open(build, variant, provider, name, threads = 1) {
  const ort = await import(dist + build);
  ort.env.wasm.wasmPaths = dist;
  ort.env.wasm.numThreads = threads;
  const answer = await fetch(`model/${variant}.onnx`);
  if (!answer.ok) throw new Error(`no model/${variant}.onnx (${answer.status})`);
  const model = new Uint8Array(await answer.arrayBuffer());
  // What the file promises of itself, from its metadata: the grid that it works on and how far it sees.
  const found = /deblur_deploy\.contract[^{]*({[^}]*})/.exec(new TextDecoder("latin1").decode(model));
  if (!found) throw new Error(`${variant}.onnx has no contract; export it with deblur-export`);
  const session = await ort.InferenceSession.create(model, { executionProviders: [provider], logSeverityLevel: 3 });
  return { ort, session, contract: JSON.parse(found[1]), ran: `${variant} on ${name}` };
}

function* tiles(width, height, { size_divisor: grid, receptive_radius_px: radius }) {
  const up = (pixels) => Math.ceil(pixels / grid) * grid;
  const size = up(Number(wanted.get("tile")) || 768);
  const margin = up(radius);
  for (let y = 0; y < height; y += size) {
    for (let x = 0; x < width; x += size) {
      const [left, top] = [Math.max(0, x - margin), Math.max(0, y - margin)];
      const [right, bottom] = [Math.min(width, x + size + margin), Math.min(height, y + size + margin)];
      yield { x, y, endX: Math.min(width, x + size), endY: Math.min(height, y + size), left, top, right, bottom };
    }
  }
}

async function restore(image) {
  const { ort, session, contract, ran } = await (loading ??= load());
  const { width, height, data } = image;
  const restored = new ImageData(new Uint8ClampedArray(data), width, height);
  const plan = [...tiles(width, height, contract)];
  const started = performance.now();
  for (const [index, tile] of plan.entries()) {
    postMessage({ share: index / plan.length, text: `${ran}: ${index} of ${plan.length}` });
    const [across, down] = [tile.right - tile.left, tile.bottom - tile.top];
    const pixels = new Uint8Array(across * down * 3);
    for (let y = 0, to = 0; y < down; y++) {
      for (let x = 0, from = 4 * ((tile.top + y) * width + tile.left); x < across; x++, from += 4) {
        pixels[to++] = data[from];
        pixels[to++] = data[from + 1];
        pixels[to++] = data[from + 2];
      }
    }
    const results = await session.run({ image: new ort.Tensor("uint8", pixels, [1, down, across, 3]) });
    const result = results.restored.data;
    for (let y = tile.y; y < tile.endY; y++) {
      let from = 3 * ((y - tile.top) * across + tile.x - tile.left);
      for (let x = tile.x, to = 4 * (y * width + x); x < tile.endX; x++, to++) {
        for (let channel = 0; channel < 3; channel++) restored.data[to++] = result[from++];
      }
    }
  }
  return { image: restored, seconds: (performance.now() - started) / 1000, ran };
}

onmessage = async ({ data }) => {
  try {
    postMessage({ text: "loading the model" });
    postMessage(await restore(data));
  } catch (error) {
    loading = undefined;
    postMessage({ error: `cannot restore this photograph: ${error.message}` });
  }
};
