//! KVM as premap sees it: the ABI, traits whose methods are ioctls, probes and statistics.
