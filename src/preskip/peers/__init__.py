"""Published changes of an attention block that preskip is compared with, each a small module, none part of the branch.

They are arms (`preskip.arms.catalogue`) from scratch, as models whose config names them in `preskip_peers`, and on a
frozen model, where they start at identity.
"""
