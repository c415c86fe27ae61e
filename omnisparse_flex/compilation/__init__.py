"""What torch.compile needs from us: Dynamo and Inductor settings, cache names."""
