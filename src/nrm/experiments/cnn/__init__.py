"""Joint relevance of channels and of clusters in a convolutional network (Table 2, Figs. 5-7).

nrm reproduce cnn-channels --data DIR --out DIR
nrm reproduce cnn-clusters --data DIR --out DIR
"""
