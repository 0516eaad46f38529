// A file becomes a screenshot, if it is one the server takes. What is wrong is told as a Failure.

/** @typedef {import("./state.js").Shot} Shot */
/** @typedef {{max_body_bytes: number, max_image_pixels: number}} Limits */

const KINDS = ["image/png", "image/jpeg", "image/webp", "image/gif", "image/bmp"];

/** A file that is not taken, and why. */
export class ImageFault extends Error {
  /**
   * @param {string} key of the text that says so
   * @param {Record<string, string | number>} values
   */
  constructor(key, values) {
    super(key);
    this.key = key;
    this.values = values;
  }
}

/**
 * Read a file and check it.
 * @param {File} file
 * @param {Limits} limits of the server
 * @param {(bytes: number) => string} showBytes
 * @returns {Promise<Shot>}
 * @throws {ImageFault}
 */
export async function readShot(file, limits, showBytes) {
  const name = file.name || "image";
  if (!KINDS.includes(file.type)) throw new ImageFault("errKind", { name });
  // base64 makes four characters of three bytes; a little room is left for the words.
  const maxBytes = Math.floor((limits.max_body_bytes * 3) / 4) - 65536;
  if (file.size > maxBytes) {
    const values = { name, size: showBytes(file.size), max: showBytes(maxBytes) };
    throw new ImageFault("errSize", values);
  }
  const url = await readUrl(file).catch(() => {
    throw new ImageFault("errBroken", { name });
  });
  const image = new Image();
  image.src = url;
  try {
    await image.decode();
  } catch {
    throw new ImageFault("errBroken", { name });
  }
  const { naturalWidth: width, naturalHeight: height } = image;
  if (width * height > limits.max_image_pixels) {
    const max = Number((limits.max_image_pixels / 1e6).toPrecision(3));
    throw new ImageFault("errPixels", { name, width, height, max });
  }
  return { url, name, width, height };
}

/**
 * The files of a drop or a paste.
 * @param {DataTransfer | null} transfer
 * @returns {File[]}
 */
export function filesOf(transfer) {
  return transfer ? Array.from(transfer.files) : [];
}

/**
 * @param {File} file
 * @returns {Promise<string>} a data: URL.
 */
function readUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(String(reader.result));
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}
