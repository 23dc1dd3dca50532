"""Train a pruned model: data, packing, distillation, the loss and the trainer."""
