"""How the embedded world's weights are made: VAE, then text encoder and UNet, a flow transformer, and
the models that judge them.

One command a stage, each of which saves, resumes when run again, and writes its log and figures beside its weights::

    python -m diffusionrl.emoji.recipe vae
    python -m diffusionrl.emoji.recipe classifier
    python -m diffusionrl.emoji.recipe skin-tones
    python -m diffusionrl.emoji.recipe detector     # several subjects in a scene
    python -m diffusionrl.emoji.recipe detector-judge
    python -m diffusionrl.emoji.recipe clip         # and the aesthetic head on it
    python -m diffusionrl.emoji.recipe preference
    python -m diffusionrl.emoji.recipe diffusion
    python -m diffusionrl.emoji.recipe flow         # a transformer on the VAE and text encoders of the others
    python -m diffusionrl.emoji.recipe turbo        # four steps without guidance, distilled from the published UNet
    python -m diffusionrl.emoji.recipe publish      # float16 weights and figures into the package
"""
