r"""The formulas of docstrings in TeX, by the first line that they have there.

A docstring that changes its formula shows it as text until it has a line here again; a test tells.
"""

FORMULAS = {
    "ELBO = E_q[log p(data | z)] - KL(q(z) || p(z)) <= log p(data),    z = g(noise, parameters)": r"""
\mathrm{ELBO} = \mathbb{E}_q[\log p(\mathrm{data} \mid z)] - \mathrm{KL}(q(z) \,\|\, p(z))
\le \log p(\mathrm{data}), \qquad z = g(\mathrm{noise}, \mathrm{parameters})
""",
    "H(z, p) = U(z) + p' M^-1 p / 2,   U(z) = -log p(z, data),   z on the real line": r"""
H(z, p) = U(z) + \tfrac12\, p^\top M^{-1} p, \qquad U(z) = -\log p(z, \mathrm{data}),
\qquad z \text{ on the real line}
""",
    "p(z | data) ~ N(z*, H^-1),   z* = argmax log p(data, z),   H = -d2 log p(data, z*) / dz2": r"""
\begin{aligned}
p(z \mid \mathrm{data}) &\approx \mathcal N(z^*, H^{-1}), \qquad
z^* = \arg\max_z \log p(\mathrm{data}, z), \qquad H = -\nabla_z^2 \log p(\mathrm{data}, z^*) \\
\log p(\mathrm{data}) &\approx \log p(\mathrm{data}, z^*) + \tfrac{\mathrm{size}}{2} \log 2\pi
- \tfrac12 \log \det H
\end{aligned}
""",
    "dz = u dt,   du = -(1 - u u') grad U(z) dt / (d - 1),   |u| = 1,   U(z) = -log p(z, data)": r"""
\mathrm{d}z = u\,\mathrm{d}t, \qquad
\mathrm{d}u = -\frac{(1 - u u^\top)\, \nabla U(z)}{d - 1}\,\mathrm{d}t, \qquad |u| = 1, \qquad
U(z) = -\log p(z, \mathrm{data})
""",
    "values* = argmax log p(data | values) + log p(values)": r"""
\mathrm{values}^* = \arg\max\; \log p(\mathrm{data} \mid \mathrm{values}) + \log p(\mathrm{values})
""",
    "q(W) = law of M diag(z) / (1 - rate),   z_j ~ Bernoulli(1 - rate) for each input of a linear map": r"""
\begin{aligned}
q(W) &= \text{law of } \frac{M\,\mathrm{diag}(z)}{1 - \mathrm{rate}}, \qquad
z_j \sim \mathrm{Bernoulli}(1 - \mathrm{rate}) \text{ for each input of a linear map} \\
\text{maximise over } M: &\quad
\mathbb{E}_z[\log p(\mathrm{data} \mid W)] + \mathbb{E}_z[\log p(W)]
\end{aligned}
""",
    "q(W) = law of M diag(z) / (1 - p),   z_j ~ Bernoulli(1 - p) for each input of the map, p its own": r"""
\begin{aligned}
q(W) &= \text{law of } \frac{M\,\mathrm{diag}(z)}{1 - p}, \qquad
z_j \sim \mathrm{Bernoulli}(1 - p) \text{ for each input of the map, } p \text{ its own} \\
\text{maximise over } M, p: &\quad \mathbb{E}_z[\log p(\mathrm{data} \mid W)]
+ \mathbb{E}_z[\log p(W)] + \sum_{\mathrm{maps}} n_{\mathrm{in}} H(p)
\end{aligned}
""",
    "1 - z = sigmoid((logit p + logit u) / temperature),   u ~ Uniform(0, 1)": r"""
1 - z = \mathrm{sigmoid}\!\left(\frac{\mathrm{logit}\, p + \mathrm{logit}\, u}{\mathrm{temperature}}
\right), \qquad u \sim \mathrm{Uniform}(0, 1)
""",
    "log p(data | values) + log p(values),": r"""
\log p(\mathrm{data} \mid \mathrm{values}) + \log p(\mathrm{values}),
""",
    "x' = x - adversarial * range(x) * sign(d log p(y | x, values) / dx).": r"""
x' = x - \mathrm{adversarial} \cdot \mathrm{range}(x) \cdot
\mathrm{sign}\, \frac{\partial \log p(y \mid x, \mathrm{values})}{\partial x}.
""",
    "Q_k(x) = f(x; w_k) + scale p_k(x),    p_k(x) = f(x; w~_k) - f(x; E[w]),    w~_k ~ prior": r"""
Q_k(x) = f(x; w_k) + \mathrm{scale} \cdot p_k(x), \qquad
p_k(x) = f(x; \tilde w_k) - f(x; \mathbb{E}[w]), \qquad \tilde w_k \sim \mathrm{prior}
""",
    "dz = s v dt,   dv = s g(z) dt - friction v dt + sqrt(2 friction) dW,   E g = grad log p(z, data)": r"""
\mathrm{d}z = s v\,\mathrm{d}t, \qquad
\mathrm{d}v = s\, g(z)\,\mathrm{d}t - \gamma v\,\mathrm{d}t + \sqrt{2\gamma}\,\mathrm{d}W, \qquad
\mathbb{E}\, g = \nabla \log p(z, \mathrm{data}), \qquad \gamma = \mathrm{friction}
""",
    "z <- z + h^2 s^2 g(z) / 2 + h s (xi + xi') / 2,    E g = grad log p(z, data)": r"""
z \leftarrow z + \tfrac12 h^2 s^2 g(z) + \tfrac12 h s\,(\xi + \xi'), \qquad
\mathbb{E}\, g = \nabla \log p(z, \mathrm{data})
""",
    "q(z) = N(m, (diag(v) + D D' / (K - 1)) / 2),   D = (z_1 - m, ..., z_K - m)": r"""
q(z) = \mathcal N\!\left(m,\; \tfrac12 \mathrm{diag}(v) + \tfrac{1}{2(K - 1)} D D^\top\right),
\qquad D = (z_1 - m, \ldots, z_K - m)
""",
    "u <- momentum u - a (H z + n),   z <- z + u,   Var n = C": r"""
u \leftarrow \mathrm{momentum} \cdot u - a (H z + n), \qquad z \leftarrow z + u, \qquad
\mathrm{Var}\, n = C
""",
    "q(z)       near  p(z | data, W)  ~  p(data | z, W)^power p(z),           p(z) of prior_keep": r"""
\begin{aligned}
q(z) &\approx p(z \mid \mathrm{data}, W) \propto p(\mathrm{data} \mid z, W)^{\mathrm{power}}\, p(z),
& p(z) &\text{ of } \mathtt{prior\_keep} \\
q(z \mid x, y) &\approx p(z \mid x, y, W) \propto p(y \mid x, z, W)^{\mathrm{power}}\, p(z \mid x),
& p(z \mid x) &\text{ learned}
\end{aligned}
""",
    "trajectory_balance   E[(log q(z) + log Z - log reward(z))^2],  log Z learned, of (x, y) a net": r"""
\begin{aligned}
\mathtt{trajectory\_balance} &\quad
\mathbb{E}[(\log q(z) + \log Z - \log \mathrm{reward}(z))^2], \quad
\log Z \text{ learned, of } (x, y) \text{ a net} \\
\mathtt{log\_variance} &\quad
\mathrm{Var} \text{ over masks of } \log q(z) - \log \mathrm{reward}(z)
\end{aligned}
""",
    "q(a_i | s) = Dirichlet(c_h pi_i),    E[a] = pi,    Var[a] = pi (1 - pi) / (c + 1)": r"""
\begin{aligned}
& q(a_i \mid s) = \mathrm{Dirichlet}(c_h \pi_i), \qquad \mathbb{E}[a] = \pi, \qquad
\mathrm{Var}[a] = \frac{\pi (1 - \pi)}{c + 1} \\
& \text{maximise } \mathbb{E}_q[\log p(y \mid a, w)]
- \sum_{\mathrm{layers}, h, i} \mathrm{KL}(q(a_i) \,\|\, p(a_i)) + \log p(w) \\
& p(a_i) = \mathrm{Dirichlet}(k \pi_i)\ \text{(scores)}, \quad
\mathrm{Dirichlet}(k / n)\ \text{(uniform)}, \quad
\mathrm{Dirichlet}(k\, \mathrm{softmax}_j\, g(\mathrm{key}_j))\ \text{(contextual, for all queries)}
\end{aligned}
""",
    "scale^2 = (sum(m^2 + s^2) + 2 b) / (n + 2 a + 2)    with hyperprior=(a, b)": r"""
\begin{aligned}
\mathrm{scale}^2 &= \frac{\sum (m^2 + s^2) + 2b}{n + 2a + 2}
&& \text{with } \mathtt{hyperprior=(a, b)} \\
\mathrm{scale}^2 &= \frac{1}{n} \sum (m^2 + s^2) && \text{without}
\end{aligned}
""",
    "global ~ C+(0, scale),  local_j ~ C+(0, 1),  raw_j ~ N(0, 1),  s_j = global local_j": r"""
\begin{aligned}
& \mathrm{global} \sim C^+(0, \mathrm{scale}), \quad \mathrm{local}_j \sim C^+(0, 1), \quad
\mathrm{raw}_j \sim \mathcal N(0, 1), \quad s_j = \mathrm{global} \cdot \mathrm{local}_j \\
& w_j = \frac{\mathrm{raw}_j\, s_j\, \mathrm{slab}}{\sqrt{\mathrm{slab}^2 + s_j^2}}
\end{aligned}
""",
    "cutpoint_1 ~ N(c_1, 1),   log(cutpoint_k - cutpoint_{k-1}) ~ N(log(c_k - c_{k-1}), 1),": r"""
\mathrm{cutpoint}_1 \sim \mathcal N(c_1, 1), \qquad
\log(\mathrm{cutpoint}_k - \mathrm{cutpoint}_{k-1}) \sim \mathcal N(\log(c_k - c_{k-1}), 1),
""",
}
