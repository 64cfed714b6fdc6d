package main;
our @parts;
if (@ARGV && $ARGV[0] eq '--version') { print "report 1.0\n"; exit 0 }
my $sum = 0;
$sum += $_->() for @parts;
print "the sum of ", scalar(@parts), " parts is $sum\n";
