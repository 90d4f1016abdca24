import json

from ml_collections import ConfigDict


def get_config():
    return ConfigDict(
        json.loads("""{
 "name": "tiny",
 "vit": {
  "depth": 4,
  "width": 32,
  "heads": 4,
  "mlp": 64,
  "patch": 4,
  "image_size": 8,
  "pretrained_size": 8,
  "norm": "pre",
  "bias": "all",
  "activation": "gelu",
  "layer_scale": true,
  "class_token": true,
  "registers": 0,
  "patch_bias": true,
  "embed_norm": false,
  "eps": 1e-06,
  "taps": [
   2,
   3,
   4
  ],
  "cuts": [
   2
  ],
  "interpolation": "bicubic",
  "mean": [
   0.485,
   0.456,
   0.406
  ],
  "std": [
   0.229,
   0.224,
   0.225
  ]
 },
 "llm": {
  "vocab": 256,
  "hidden": 64,
  "layers": 4,
  "heads": 4,
  "kv_heads": 2,
  "head_dim": 16,
  "mlp": 128,
  "rope_theta": 10000.0,
  "eps": 1e-05,
  "qkv_bias": false,
  "tied": true,
  "dynamic_ntk": 0,
  "logn": 0
 },
 "xattn": {
  "heads": 2,
  "kv_heads": 2,
  "head_dim": 16,
  "ffn": 32,
  "every": 1,
  "schedule": "blocked",
  "sinks": 1,
  "tile": 8,
  "eps": 1e-05
 },
 "moe": {
  "copies": 0,
  "slices": 2,
  "top_k": 2,
  "gates": "renormalise",
  "capacity": 0.0,
  "balance": 0.01,
  "z": 0.001,
  "tile": 8,
  "upcycle": "preserve"
 },
 "media": {
  "tokens": 2,
  "placeholder": "<|media|>"
 },
 "bridge": {
  "kind": "routed",
  "latents": 3,
  "depth": 2,
  "heads": 2,
  "head_dim": 16,
  "ffn": 2
 },
 "data": {
  "sources": [
   "llava:rows.jsonl",
   "folder:pictures"
  ],
  "weights": [
   2.0,
   1.0
  ],
  "tasks": [],
  "ends": "repeat",
  "template": "chatml",
  "length": 96,
  "images": 4,
  "targets": 48,
  "pool": 1,
  "slots": 4,
  "pairs": 24,
  "dialogs": 0,
  "isolate": true,
  "window": 4,
  "resize": "squash",
  "scaled_decoding": false,
  "most_drops": 1.0,
  "cache_features": false,
  "seed": 0
 },
 "clean": {
  "letters": 0.2,
  "digits": 7,
  "duplicates": 0.5,
  "links": [
   "https?:",
   "\\\\.(com|png)"
  ],
  "words": 3,
  "dates": [
   "\\\\d{4}-\\\\d\\\\d-\\\\d\\\\d"
  ],
  "simplify": true,
  "similarity": 0.3,
  "deviation": 2.0,
  "aspect": 3.0,
  "side": 8,
  "web_images": 5,
  "web_characters": 200,
  "web_similarity": 0.2,
  "page_confidence": 0.8,
  "page_characters": 8,
  "page_similarity": 0.8
 },
 "optim": {
  "lr": 0.001,
  "min_lr": 0.0001,
  "warmup": 2,
  "b1": 0.9,
  "b2": 0.999,
  "eps": 1e-08,
  "mu_dtype": "float32",
  "weight_decay": 0.05,
  "no_decay": [
   "gate$",
   "norm",
   "bias$",
   "^media/"
  ],
  "clip": 1.0,
  "phases": [
   {
    "start": 0.0,
    "step": null,
    "warmup": 2,
    "rules": [
     {
      "pattern": "^(xattn|media|bridge)/",
      "lr": 1.0
     },
     {
      "pattern": "^(vit|llm)/",
      "lr": null
     }
    ]
   },
   {
    "start": 0.25,
    "step": null,
    "warmup": 2,
    "rules": [
     {
      "pattern": "^vit/blocks/[23]/",
      "lr": 0.5
     },
     {
      "pattern": "^(xattn|media|bridge)/",
      "lr": 1.0
     },
     {
      "pattern": "^(vit|llm)/",
      "lr": null
     }
    ]
   }
  ]
 },
 "train": {
  "steps": 12,
  "batch": 2,
  "accumulate": 1,
  "dtype": "float32",
  "matmul_precision": "float32",
  "param_dtype": "float32",
  "frozen_dtype": "float32",
  "remat": "none",
  "loss_chunk": 0,
  "save_every": 3,
  "keep": 1,
  "log_every": 1,
  "monitors": [],
  "monitor_every": 0,
  "monitor_questions": 0,
  "seed": 0,
  "peak_flops": 0.0,
  "save_minutes": 30.0,
  "bad_updates": 10
 },
 "mesh": {
  "data": -1,
  "fsdp": 1,
  "expert": 1,
  "tensor": 1,
  "slices": 1,
  "zero": 2,
  "frozen": "replicated",
  "images": "all"
 },
 "init": {
  "vision": "vision",
  "llm": "llm",
  "centre_norms": false,
  "beyond_context": false
 }
}"""),
        convert_dict=True,
    )
