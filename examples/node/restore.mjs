// Restores one image:  node restore.mjs blurry.jpg sharp.png [model.onnx]
// The model does the rest: padding, scaling and rounding are inside the graph.
import { fileURLToPath } from "node:url";
import ort from "onnxruntime-node";
import sharp from "sharp";

const shipped = fileURLToPath(new URL("../../models/hd/int8.onnx", import.meta.url));
const [source, target, model = shipped] = process.argv.slice(2);
if (!target) {
  console.error("usage: node restore.mjs blurry.jpg sharp.png [model.onnx]");
  process.exit(2);
}
const session = await ort.InferenceSession.create(model);
const pixels = sharp(source).autoOrient().toColourspace("srgb").removeAlpha();
const { data, info } = await pixels.raw().toBuffer({ resolveWithObject: true });
const { width, height, channels } = info;
const { restored } = await session.run({ image: new ort.Tensor("uint8", data, [1, height, width, channels]) });
await sharp(restored.data, { raw: { width, height, channels } }).toFile(target);
