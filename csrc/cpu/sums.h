// Two sums over a part of a map, of a channel.
#pragma once

namespace auglocal {

struct SumPair {
  double first = 0, second = 0;
};

}  // namespace auglocal
