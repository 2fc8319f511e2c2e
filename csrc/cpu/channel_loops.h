// The factors of a lane's channel. For `each_level.h`: what runs for every element has to be compiled for the
// level that calls it, or it is not inlined.
namespace auglocal {
namespace {
namespace AUGLOCAL_LEVEL {

// What the factors of `Channels`, the first three, are for a lane.
template <typename Factors>
auto channel_of(const Factors& factors, int lane) {
  return Channel<decltype(factors.at(0, 0))>{factors.at(0, lane), factors.at(1, lane), factors.at(2, lane)};
}

}  // namespace AUGLOCAL_LEVEL
}  // namespace
}  // namespace auglocal
