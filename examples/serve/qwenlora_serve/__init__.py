"""A Ray Serve application: pictures with any stack of LoRAs, from many replicas of one model."""
