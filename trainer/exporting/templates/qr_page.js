// The script of a page that fits one QR code: `qr_page.py` puts numbers and layers in. Names are short, since every byte counts, and the
// characters # % \ stand nowhere, which an address (data:) and a text would read as something else.
// E: a list of f(0) ... f(l - 1). g: the next number below k, out of the one large number n that all weights are.
E = (l, f) => Array.from({length: l}, (_, i) => f(i));
g = k => {
q = n / (k = BigInt(k));
k = Number(n - q * k);
n = q;
return k;
};
// R: the next tensor of l numbers: integers times a power of two, or places in a table of k such numbers.
R = l => {
let k = g({{ most }}), r = g({{ most }}), m = g({{ most }}), s = 2 ** -g(99), V = l => E(l, _ => (g(r) - m) * s), t = k && V(k);
return k ? E(l, _ => t[g(k)]) : V(l);
};
// H: values of a layer's output, [c, h, w].
H = (x, c, h, w) => (x.c = c, x.h = h, x.w = w, x);
// K: a convolution from I to O channels, kernel k, stride s, padding p; d: of each channel by itself; a: then ReLU.
K = (I, O, k, s, p, d, a) => {
d && (I = 1);
let W = R(O * I * k * k), b = R(O);
return x => {
let h = (x.h + 2 * p - k) / s + 1 | 0, w = (x.w + 2 * p - k) / s + 1 | 0;
return H(E(O * h * w, i => {
let o = i / h / w | 0, e = i / w | 0, t = b[o];
for (let j = 0; j < I * k * k; j++) {
let y = j / k | 0, z = (i - e * w) * s + j - y * k - p, q = y / k | 0, r = (e - o * h) * s + y - q * k - p;
r >= 0 & r < x.h & z >= 0 & z < x.w && (t += W[o * I * k * k + j] * x[((d ? o : q) * x.h + r) * x.w + z]);
}
return a && t < 0 ? 0 : t;
}), O, h, w);
};
};
{% if "M" in used -%}
// M: the mean of each channel.
M = x => H(E(x.c, i => x.slice(i *= x.h * x.w, i + x.h * x.w).reduce((a, b) => a + b) / x.h / x.w), x.c, 1, 1);
{% endif -%}
{% if "P" in used -%}
// P: the largest of each k x k, in steps of s.
P = (k, s) => x => {
let h = (x.h - k) / s + 1 | 0, w = (x.w - k) / s + 1 | 0;
return H(E(x.c * h * w, i => {
let o = i / h / w | 0, e = i / w | 0;
return Math.max(...E(k * k, j => x[(o * x.h + (e - o * h) * s + (j / k | 0)) * x.w + (i - e * w) * s + j - k * (j / k | 0)]));
}), x.c, h, w);
};
{% endif -%}
{% if "F" in used -%}
// F: all values are channels.
F = x => H(x, x.length, 1, 1);
{% endif -%}
{% if "S" in used -%}
// S: keeps a value; A adds it, and a: then ReLU.
S = x => D = x;
A = a => x => H(x.map((v, i) => (v += D[i], a && v < 0 ? 0 : v)), x.c, x.h, x.w);
{% endif -%}
T = "{{ text }}";
n = 0n;
for (i = T.length; i--;) e = T.charCodeAt(i) - 36, n = n * 88n + BigInt(e - (e > 1) - (e > 24) - (e > 56));
L = [{{ layers }}];
// N: pixels, 0 to 255, to logits. C: to the number of the highest one.
N = p => L.reduce((x, f) => f(x), H(E({{ size }}, i => (p[i] / 255 {{ less_mean }}) / {{ std }}), 1, {{ height }}, {{ width }}));
C = p => (y = N(p)).indexOf(Math.max(...y));
// What is drawn is moved so that its centre of mass is the image's.
f = B.getContext("2d");
B.onpointerdown = B.onpointermove = e => {
if (e.buttons) {
f.lineWidth = {{ stroke }};
f.lineCap = "round";
f.lineTo(x = e.offsetX / 10, y = e.offsetY / 10);
f.stroke();
f.beginPath();
f.moveTo(x, y);
d = f.getImageData(0, 0, {{ width }}, {{ height }}).data;
for (s = u = v = i = 0; i < {{ size }}; i++) a = d[i * 4 + 3], s += a, u += a * (i - {{ width }} * (j = i / {{ width }} | 0)), v += a * j;
j = {{ width }} * Math.round(v / s - {{ (height - 1) / 2 }}) + Math.round(u / s - {{ (width - 1) / 2 }});
Z.textContent = {% if names %}{{ names }}[{% endif %}C(E({{ size }}, i => d[(i + j) * 4 + 3] || 0)){% if names %}]{% endif %};
}
};
onpointerup = _ => f.beginPath();
B.ondblclick = _ => B.width = {{ width }};
Z.textContent = C(E({{ size }}, i => i * 37 + (i / 101 | 0) * 11 & 255)) == {{ expected }} ? "Draw. Double click: anew" : "broken";
