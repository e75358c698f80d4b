/tmp/pooling/exp/lim | head -1; /tmp/pooling/exp/sum4; /tmp/pooling/exp/lim | head -1
