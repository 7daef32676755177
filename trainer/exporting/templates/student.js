// Functions of the script that runs a student in a browser; a page holds those that its network needs.
// The coder is an adaptive binary range coder. Its probabilities are doubles, which every engine computes alike.
function reader(bytes) {
  let at = 4, low = 0, high = 4294967295, value = ((bytes[0] << 24) | (bytes[1] << 16) | (bytes[2] << 8) | bytes[3]) >>> 0;
  return model => {
    const p = model[0], bound = low + Math.floor((high - low) * p), bit = value <= bound ? 1 : 0;
    if (bit) high = bound; else low = bound + 1;
    model[0] = Math.min(Math.max(p + (bit - p) / (model[1] + 1.6), 1 / 4096), 4095 / 4096);
    if (model[1] < 250) model[1]++;
    while (((low ^ high) & 0xff000000) === 0) {
      low = low << 8 >>> 0; high = (high << 8 | 255) >>> 0; value = (value << 8 | (bytes[at++] || 0)) >>> 0;
    }
    return bit;
  };
}
const newModels = count => Array.from({length: count}, () => [0.5, 0]);
function codeOf(bit, nodes, depth) {
  let node = 1;
  while (depth--) node = node * 2 + bit(nodes[node]);
  return node;
}
function alivePositions(bit, rows, columns) {
  const found = new Uint8Array(rows * columns), ones = new Float64Array(columns), nodes = newModels(48);
  let all = 0;
  for (let r = 0, i = 0; r < rows; r++) for (let c = 0; c < columns; c++, i++) {
    const share = (ones[c] + 0.4) / (r * all / (i + 1) + 0.4);
    const context = Math.min(11, Math.floor(4 * share)) * 4 + (c ? found[i - 1] : 0) * 2 + (r ? found[i - columns] : 0);
    if (bit(nodes[context])) { found[i] = 1; ones[c]++; all++; }
  }
  return found;
}
function decodedWeight(bit, [rows, columns, depth, masked, values]) {
  const size = rows * columns, dense = new Float32Array(size), nodes = newModels(1 << depth);
  const alive = masked ? alivePositions(bit, rows, columns) : dense.fill(1);
  for (let i = 0; i < size; i++) dense[i] = alive[i] ? values[depth ? codeOf(bit, nodes, depth) - (1 << depth) : 0] : 0;
  return dense;
}
const base64 = text => Uint8Array.from(atob(text), letter => letter.charCodeAt(0));
const floats = text => new Float32Array(base64(text).buffer);
const product = shape => shape.reduce((a, b) => a * b, 1);
const strides = shape => shape.map((_, axis) => product(shape.slice(axis + 1)));
const mapped = (x, f) => x.map(value => f(value));
function gather(x, shape, steps, start = 0) {
  const out = new Float32Array(product(shape)), at = shape.map(() => 0);
  for (let i = 0, from = start; i < out.length; i++) {
    out[i] = x[from];
    for (let axis = shape.length - 1; axis >= 0; axis--) {
      from += steps[axis];
      if (++at[axis] < shape[axis]) break;
      from -= steps[axis] * shape[axis]; at[axis] = 0;
    }
  }
  return out;
}
function spread(x, from, to) {
  const steps = strides(from), padded = to.map((_, axis) => axis - (to.length - from.length));
  return gather(x, to, padded.map(axis => axis < 0 || from[axis] === 1 ? 0 : steps[axis]));
}
const sigmoid = x => 1 / (1 + Math.exp(-x));
const softplus = (x, beta) => x * beta > 20 ? x : Math.log1p(Math.exp(x * beta)) / beta;
function erf(x) {  // Abramowitz and Stegun 7.1.26, to 1.5e-7
  const t = 1 / (1 + 0.3275911 * Math.abs(x));
  const poly = ((((1.061405429 * t - 1.453152027) * t + 1.421413741) * t - 0.284496736) * t + 0.254829592) * t;
  return Math.sign(x) * (1 - poly * Math.exp(-x * x));
}
function reduced(x, shape, axes, mean) {
  const steps = strides(shape), kept = shape.map((_, a) => a).filter(a => !axes.includes(a));
  const moved = gather(x, [...kept, ...axes].map(a => shape[a]), [...kept, ...axes].map(a => steps[a]));
  const inner = product(axes.map(a => shape[a])), out = new Float32Array(moved.length / inner);
  for (let i = 0; i < out.length; i++) {
    let found = mean ? 0 : -Infinity;
    for (let j = 0; j < inner; j++) found = mean ? found + moved[i * inner + j] : Math.max(found, moved[i * inner + j]);
    out[i] = mean ? found / inner : found;
  }
  return out;
}
function normal(x, size, eps) {
  const out = new Float32Array(x.length);
  for (let start = 0; start < x.length; start += size) {
    let sum = 0, squares = 0;
    for (let i = start; i < start + size; i++) sum += x[i];
    const mean = sum / size;
    for (let i = start; i < start + size; i++) squares += (x[i] - mean) ** 2;
    const scale = 1 / Math.sqrt(squares / size + eps);
    for (let i = start; i < start + size; i++) out[i] = (x[i] - mean) * scale;
  }
  return out;
}
function pooled(x, [channels, h, w], [oh, ow], [kh, kw], [sh, sw], [ph, pw], [dh, dw], mean, counted) {
  const out = new Float32Array(channels * oh * ow);
  for (let c = 0, o = 0; c < channels; c++) for (let y = 0; y < oh; y++) for (let z = 0; z < ow; z++, o++) {
    let found = mean ? 0 : -Infinity, inside = 0, within = 0;
    for (let i = 0; i < kh; i++) for (let j = 0; j < kw; j++) {
      const a = y * sh - ph + i * dh, b = z * sw - pw + j * dw;
      if (a < h + ph && b < w + pw) within++;
      if (a < 0 || b < 0 || a >= h || b >= w) continue;
      const value = x[(c * h + a) * w + b];
      found = mean ? found + value : Math.max(found, value); inside++;
    }
    out[o] = mean ? found / (counted ? within : inside) : found;
  }
  return out;
}
function linear(x, weight, bias, inputs) {
  const outputs = weight.length / inputs, out = new Float32Array(x.length / inputs * outputs);
  for (let row = 0, o = 0; row < x.length; row += inputs) for (let i = 0, w = 0; i < outputs; i++, o++) {
    let sum = bias ? bias[i] : 0;
    for (let j = 0; j < inputs; j++, w++) sum += x[row + j] * weight[w];
    out[o] = sum;
  }
  return out;
}
function conv(x, weight, bias, [, h, w], [channels, oh, ow], [inputs, kh, kw], [sh, sw], [ph, pw], [dh, dw], groups) {
  const out = new Float32Array(channels * oh * ow), each = channels / groups;
  for (let c = 0; c < channels; c++) {
    const first = Math.floor(c / each) * inputs, sums = new Float64Array(oh * ow).fill(bias ? bias[c] : 0);
    for (let i = 0; i < inputs; i++) for (let a = 0; a < kh; a++) for (let b = 0; b < kw; b++) {
      const value = weight[((c * inputs + i) * kh + a) * kw + b];
      if (value) for (let y = 0; y < oh; y++) {
        const down = y * sh - ph + a * dh;
        if (down >= 0 && down < h) for (let z = 0, across = b * dw - pw; z < ow; z++, across += sw)
          if (across >= 0 && across < w) sums[y * ow + z] += value * x[((first + i) * h + down) * w + across];
      }
    }
    out.set(sums, c * oh * ow);
  }
  return out;
}
function affine(x, scale, shift, inner) {
  return x.map((value, i) => { const c = Math.floor(i / inner) % scale.length; return value * scale[c] + shift[c]; });
}
function recurrent(x, [steps, inputs], hidden, wi, wh, bi, bh, gates, backward) {
  const out = new Float32Array(steps * hidden), h = new Float32Array(hidden), c = new Float32Array(hidden);
  const sums = (m, v, n, b) => linear(v, m, b, n);
  for (let t = 0; t < steps; t++) {
    const at = backward ? steps - 1 - t : t, row = x.subarray(at * inputs, (at + 1) * inputs);
    const a = sums(wi, row, inputs, bi), b = sums(wh, h, hidden, bh);
    for (let k = 0; k < hidden; k++) {
      const g = n => a[n * hidden + k] + b[n * hidden + k];
      if (gates === 4) {
        c[k] = sigmoid(g(1)) * c[k] + sigmoid(g(0)) * Math.tanh(g(2));
        h[k] = sigmoid(g(3)) * Math.tanh(c[k]);
      } else {
        const fresh = Math.tanh(a[2 * hidden + k] + sigmoid(g(0)) * b[2 * hidden + k]), z = sigmoid(g(1));
        h[k] = (1 - z) * fresh + z * h[k];
      }
    }
    out.set(h, at * hidden);
  }
  return out;
}
function concat(parts, shapes, axis) {
  const inner = shapes.map(shape => product(shape.slice(axis))), outer = product(shapes[0].slice(0, axis));
  const out = new Float32Array(parts.reduce((sum, part) => sum + part.length, 0));
  for (let i = 0, at = 0; i < outer; i++) parts.forEach((part, n) => {
    out.set(part.subarray(i * inner[n], (i + 1) * inner[n]), at); at += inner[n];
  });
  return out;
}
function each(x, count, f) {
  const size = x.length / count, parts = Array.from({length: count}, (_, i) => f(x.subarray(i * size, (i + 1) * size)));
  return concat(parts, parts.map(part => [part.length]), 0);
}
function binary(x, xs, y, ys, to, f) {
  const a = spread(x, xs, to), b = spread(y, ys, to);
  return a.map((value, i) => f(value, b[i]));
}
function softmax(x, shape, axis) {
  const inner = product(shape.slice(axis + 1)), size = shape[axis], out = new Float32Array(x.length);
  for (let o = 0; o < x.length; o += inner * size) for (let i = o; i < o + inner; i++) {
    let most = -Infinity, sum = 0;
    for (let k = 0; k < size; k++) most = Math.max(most, x[i + k * inner]);
    for (let k = 0; k < size; k++) sum += Math.exp(x[i + k * inner] - most);
    for (let k = 0; k < size; k++) out[i + k * inner] = Math.exp(x[i + k * inner] - most) / sum;
  }
  return out;
}
function matmul(x, xs, y, ys, to) {
  const [rows, inner, columns] = [xs.at(-2), xs.at(-1), ys.at(-1)], out = new Float32Array(product(to)), lead = to.slice(0, -2);
  const a = spread(x, xs, [...lead, rows, inner]), b = spread(y, ys, [...lead, inner, columns]);
  for (let n = 0, o = 0; n < product(lead); n++) for (let r = 0; r < rows; r++) for (let c = 0; c < columns; c++, o++) {
    let sum = 0;
    for (let k = 0; k < inner; k++) sum += a[(n * rows + r) * inner + k] * b[(n * inner + k) * columns + c];
    out[o] = sum;
  }
  return out;
}
function pad(x, shape, padding, value) {
  const to = shape.map((size, axis) => size + padding[axis][0] + padding[axis][1]), out = new Float32Array(product(to)).fill(value);
  const steps = strides(to), from = strides(shape);
  x.forEach((found, i) => {
    let at = 0;
    shape.forEach((size, axis) => { at += (Math.floor(i / from[axis]) % size + padding[axis][0]) * steps[axis]; });
    out[at] = found;
  });
  return out;
}
