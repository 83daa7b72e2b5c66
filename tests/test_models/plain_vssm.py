"""VMamba written a second time, plainly, as a check of the first.

Channel-first maps, explicit flips and transpositions, a loop over the positions, options read from upstream's
constructor arguments. Written from the description of the network; shares no code with the package.
"""

import math

import torch
from torch.nn import functional as F

ACTS = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu, "sigmoid": torch.sigmoid}
DEFAULTS = dict(
    patch_size=4, in_chans=3, num_classes=1000, depths=[2, 2, 9, 2], dims=[96, 192, 384, 768], ssm_d_state=16,
    ssm_ratio=2.0, ssm_dt_rank="auto", ssm_act_layer="silu", ssm_conv=3, ssm_conv_bias=True, ssm_init="v0",
    forward_type="v2", mlp_ratio=4.0, mlp_act_layer="gelu", gmlp=False, patch_norm=True, norm_layer="ln",
    downsample_version="v2", patchembed_version="v1", posembed=False, imgsize=224, out_indices=(0, 1, 2, 3),
)  # fmt: skip


class PlainVSSM:
    """Upstream's network as a function of its arguments and state dict ``sd`` (upstream names)."""

    def __init__(self, form, kwargs, sd, training=False):
        self.form, self.sd, self.training = form, sd, training
        self.o = {**DEFAULTS, **kwargs}
        forward_type = self.o["forward_type"]
        flags = {}
        for flag in ("no32", "oact", "noz", "nozact"):
            flags[flag] = forward_type.endswith("_" + flag)
            forward_type = forward_type.removesuffix("_" + flag)
        for kind in ("onnone", "ondwconv3", "oncnorm", "onsoftmax", "onsigmoid"):
            if forward_type.endswith("_" + kind):
                flags["out"] = kind
                forward_type = forward_type.removesuffix("_" + kind)
        self.flags, self.base = flags, forward_type
        self.vanilla = forward_type in ("v0", "v0seq")

    def __call__(self, image):
        x = self.stem(image)
        if self.o["posembed"] and self.form == "classifier":
            x = x + self.sd["pos_embed"]
        outs = []
        depths = self.o["depths"]
        for i, depth in enumerate(depths):
            for j in range(depth):
                x = self.block(x, f"layers.{i}.blocks.{j}.")
            if self.form == "backbone" and i in self.o["out_indices"]:
                outs.append(self.norm(x, f"outnorm{i}."))
            if i < len(depths) - 1:
                x = self.downsample(x, f"layers.{i}.downsample.")
        if self.form == "backbone":
            return outs
        x = self.norm(x, "classifier.norm.").mean((2, 3))
        return [x @ self.sd["classifier.head.weight"].T + self.sd["classifier.head.bias"]]

    def norm(self, x, name):
        weight, bias = self.sd[name + "weight"], self.sd[name + "bias"]
        if self.o["norm_layer"].lower() == "bn" and "op.out_norm" not in name:
            if self.training:
                mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
            else:
                mean, var = self.sd[name + "running_mean"], self.sd[name + "running_var"]
            mean, var = mean[None, :, None, None], var[None, :, None, None]
        else:
            mean, var = x.mean(1, keepdim=True), x.var(1, unbiased=False, keepdim=True)
        return (x - mean) / (var + 1e-5).sqrt() * weight[None, :, None, None] + bias[None, :, None, None]

    def linear(self, x, name):
        bias = self.sd.get(name + "bias")
        y = torch.einsum("bchw,oc->bohw", x, self.sd[name + "weight"])
        return y if bias is None else y + bias[None, :, None, None]

    def conv(self, x, name, **options):
        return F.conv2d(x.contiguous(), self.sd[name + "weight"], self.sd.get(name + "bias"), **options)

    def stem(self, x):
        size, normed = self.o["patch_size"], self.o["patch_norm"]
        if self.o["patchembed_version"] == "v1":
            x = self.conv(x, "patch_embed.0.", stride=size)
            return self.norm(x, "patch_embed.2.") if normed else x
        x = self.conv(x, "patch_embed.0.", stride=size // 2, padding=1)
        x = F.gelu(self.norm(x, "patch_embed.2.") if normed else x)
        x = self.conv(x, "patch_embed.5.", stride=size // 2, padding=1)
        return self.norm(x, "patch_embed.7.") if normed else x

    def downsample(self, x, name):
        if self.o["downsample_version"] == "v1":
            x = F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2))
            parts = [x[:, :, row::2, column::2] for column in (0, 1) for row in (0, 1)]
            return self.linear(self.norm(torch.cat(parts, 1), name + "norm."), name + "reduction.")
        padding = 1 if self.o["downsample_version"] == "v3" else 0
        return self.norm(self.conv(x, name + "1.", stride=2, padding=padding), name + "3.")

    def block(self, x, name):
        if self.o["ssm_ratio"] > 0:
            x = x + self.ss2d(self.norm(x, name + "norm."), name + "op.")
        if self.o["mlp_ratio"] > 0:
            x = x + self.mlp(self.norm(x, name + "norm2."), name + "mlp.")
        return x

    def mlp(self, x, name):
        act = ACTS[self.o["mlp_act_layer"].lower()]
        x = self.linear(x, name + "fc1.")
        if self.o["gmlp"]:
            half = x.shape[1] // 2
            x = x[:, :half] * act(x[:, half:])
        else:
            x = act(x)
        return self.linear(x, name + "fc2.")

    def ss2d(self, x, name):
        act = F.silu if self.vanilla else ACTS[self.o["ssm_act_layer"].lower()]
        x = self.linear(x, name + "in_proj.")
        z = None
        if not self.flags["noz"]:
            half = x.shape[1] // 2
            x, z = x[:, :half], x[:, half:]
            z = z if self.flags["nozact"] else act(z)
        kernel = 3 if self.vanilla else self.o["ssm_conv"]
        if kernel > 1:
            x = self.conv(x, name + "conv2d.", padding=kernel // 2, groups=x.shape[1])
        x = act(x)
        y = self.cascade(x, name) if self.base.endswith("2dc") else self.scans(x, name)
        y = self.out_norm(y, name + "out_norm.")
        y = F.gelu(y) if self.flags["oact"] else y
        return self.linear(y if z is None else y * z, name + "out_proj.")

    def out_norm(self, y, name):
        kind = self.flags.get("out")
        if kind is None:
            return self.norm(y, name)
        if kind == "onnone":
            return y
        if kind == "onsigmoid":
            return torch.sigmoid(y)
        if kind == "onsoftmax":
            return torch.softmax(y.flatten(2), 2).view_as(y)
        if kind == "oncnorm":
            return self.conv(self.norm(y, name + "0."), name + "2.", padding=1, groups=y.shape[1])
        return self.conv(y, name + "1.", padding=1, groups=y.shape[1])

    def scans(self, x, name):
        b, d, h, w = x.shape
        back = lambda y: y.view(b, d, h, w)  # noqa: E731
        rows, columns = x.flatten(2), x.transpose(2, 3).flatten(2)
        turned = lambda y: y.view(b, d, w, h).transpose(2, 3)  # noqa: E731
        if self.base.endswith("1d"):
            routes = [(rows, False, back)] * 4
        elif self.base.endswith("2d"):
            routes = [(rows, False, back)] * 2 + [(rows, True, back)] * 2
        elif self.base.endswith("2d3"):
            total = 0
            for k in range(4):
                rotated = x.rot90(k, (2, 3))
                y = self.scan(rotated.flatten(2), name, k).view(rotated.shape)
                total = total + y.rot90(-k, (2, 3))
            return total
        else:
            routes = [(rows, False, back), (columns, False, turned), (rows, True, back), (columns, True, turned)]
        total = 0
        for k, (sequence, flipped, undo) in enumerate(routes):
            y = self.scan(sequence.flip(2) if flipped else sequence, name, k)
            total = total + undo(y.flip(2) if flipped else y)
        return total

    def cascade(self, x, name):
        plain = lambda t: F.layer_norm(t.permute(0, 2, 3, 1), (t.shape[1],)).permute(0, 3, 1, 2)  # noqa: E731
        x = plain(x)
        y = torch.stack([self.scan(x[:, :, i], name, 0) + self.scan(x[:, :, i].flip(2), name, 1)
                         for i in range(x.shape[2])], 2)  # fmt: skip
        y = plain(y)
        return torch.stack([self.scan(y[..., i], name, 2) + self.scan(y[..., i].flip(2), name, 3)
                            for i in range(y.shape[3])], 3)  # fmt: skip

    def scan(self, u, name, k):
        """Selective scan of ``u`` (b, d, l) with the parameters of direction ``k``."""
        d, n = u.shape[1], self.o["ssm_d_state"]
        rank = self.sd[name + "dt_projs_weight"].shape[2]
        assert self.o["ssm_dt_rank"] != "auto" or rank == math.ceil(self.sd[name + "in_proj.weight"].shape[1] / 16)
        projected = torch.einsum("cd,bdl->bcl", self.sd[name + "x_proj_weight"][k], u)
        dt, b_in, c_out = projected[:, :rank], projected[:, rank : rank + n], projected[:, rank + n :]
        delta = torch.einsum("dr,brl->bdl", self.sd[name + "dt_projs_weight"][k], dt)
        delta = F.softplus(delta + self.sd[name + "dt_projs_bias"][k][None, :, None])
        decay = -self.sd[name + "A_logs"].view(4, d, n)[k].exp()
        skip = self.sd[name + "Ds"].view(4, d)[k]
        state, outs = u.new_zeros(u.shape[0], d, n), []
        for t in range(u.shape[2]):
            step = delta[:, :, t, None]
            state = (step * decay).exp() * state + step * b_in[:, None, :, t] * u[:, :, t, None]
            outs.append((state * c_out[:, None, :, t]).sum(2) + skip * u[:, :, t])
        return torch.stack(outs, 2)
